"""Checkpoints: bit-equal for every weight type, whole or refused, anywhere."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_weights import TYPES

from jaxllm import checkpoint, models
from jaxllm.checkpoint.model import recorded
from jaxllm.core import structure, weights
from jaxllm.core.compat import make_mesh
from jaxllm.core.formats import ActivationFormat, Integer, normal_float
from jaxllm.core.model import History, with_weight
from jaxllm.core.spec import expression
from jaxllm.core.stats import Stats
from jaxllm.distributed import place

IN, OUT = 24, 16


def normal(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)


def quantized(fmt, block=None, double=False):
    """Round-to-nearest codes; with ``double`` the scales are codes themselves."""
    w = normal(1, OUT, IN)
    blocks = 1 if block is None else -(-IN // block)
    scale = jnp.full((OUT, blocks), 0.3)
    zero = jnp.full((OUT, blocks), 3.0) if not fmt.symmetric else None
    if double:
        inner = Integer(8, symmetric=True)
        size = jnp.full((OUT, 1), 0.01)
        made = weights.Quantized.encode(scale.T, size[:blocks], None, inner, None, "f4")
        scale = made
    return weights.Quantized.encode(w, scale, zero, fmt, block, "float32")


def dense():
    return normal(0, IN, OUT)


def low_rank():
    return weights.LowRank(normal(2, IN, 2), normal(3, 2, OUT), 0.5)


def sparse(pattern: str = "2:4"):
    keep = jnp.broadcast_to(jnp.arange(IN)[:, None] % 4 < 2, (IN, OUT))
    kept = IN // 2 * (OUT if pattern == "mask" else 1)
    return weights.Sparse.of(dense(), keep, kept, pattern)


def sparse_codes():
    return sparse().refine(lambda w, s, m: quantized(Integer(4)), None)


def rotated():
    turn = weights.Hadamard(jnp.sign(normal(4, IN)), 8)
    return weights.Transformed(turn, quantized(Integer(3), 10))


def scaled():
    return weights.Transformed(weights.Scale(normal(4, IN)), dense())


def permuted():
    return weights.Transformed(weights.Permutation(jnp.arange(IN)[::-1]), dense())


def turned():
    matrix = jnp.linalg.qr(normal(6, IN, IN))[0]
    heads = weights.PerHead(weights.Hadamard(), 8)
    inner = weights.Transformed(heads, quantized(Integer(4)))
    return weights.Transformed(weights.Orthogonal(matrix), inner)


# At least one value of every weight type, nested as methods nest them.
EXAMPLES = {
    "int3 blocks with a short one": lambda: quantized(Integer(3), 10),
    "int8": lambda: quantized(Integer(8, symmetric=True)),
    "nf4 with quantized scales": lambda: quantized(normal_float(4), 12, double=True),
    "low rank": low_rank,
    "sum": lambda: weights.Sum((sparse_codes(), weights.Trainable(low_rank()))),
    "sparse": sparse,
    "sparse with one total": lambda: sparse("mask"),
    "rotated": rotated,
    "permuted": permuted,
    "turned": turned,
    "activations": lambda: weights.ActivationQuantized(scaled(), ActivationFormat(4)),
}
# and every other type that the laws know; integers of all widths are one type
EXAMPLES |= {n: make for n, make in TYPES.items() if not n.strip("s").startswith("int")}


@functools.cache
def example(name: str):
    """Of the shapes that its solver gives, random bits: most are traced, not solved."""
    try:
        shapes = jax.eval_shape(EXAMPLES[name])
    except jax.errors.JAXTypeError:  # its shapes depend on the values
        return EXAMPLES[name]()
    bits = np.random.default_rng(len(name))
    return jax.tree.map(lambda a: random_bits(bits, a), shapes)


def random_bits(bits: np.random.Generator, a) -> jax.Array:
    drawn = bits.bytes(a.size * a.dtype.itemsize)
    return jnp.asarray(np.frombuffer(drawn, a.dtype).reshape(a.shape))


@functools.cache
def small_model(tied: bool = True):
    layer = models.Layer(models.Attention(2, 1, 16), models.MLP(48))
    config = models.Transformer(64, 32, (layer,) * 2, tied=tied)
    return models.init(config, jax.random.key(0))


def assert_same_bits(a, b):
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*leaves, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@expression
def halve(times: int = 1, inner=None):
    return lambda model: model


def test_examples_hold_every_weight_type():
    found = set()

    def visit(node):
        if dataclasses.is_dataclass(node):
            found.add(type(node).__name__)
            for field in dataclasses.fields(node):
                visit(getattr(node, field.name))
        elif isinstance(node, tuple):
            for part in node:
                visit(part)

    visit(tuple(example(name) for name in EXAMPLES))
    kinds = (getattr(weights, n) for n in weights.__all__)
    types = {k.__name__ for k in kinds if isinstance(k, type)} - {"Weight"}
    assert types <= found


@pytest.mark.parametrize("name", EXAMPLES)
def test_structure_rebuilds_every_weight_type(name):
    tree = {"x": [example(name), (None, 3, "text", True)]}
    data, leaves = structure.describe(tree)
    again = structure.build(json.loads(json.dumps(data)), lambda path, _: leaves[path])
    assert_same_bits(tree["x"][0], again["x"][0])
    assert again["x"][1] == tree["x"][1]
    shapes = structure.abstract(data)["x"][0]
    assert jax.tree.structure(shapes) == jax.tree.structure(tree["x"][0])
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(tree["x"][0]), strict=True)
    assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def test_structure_keeps_ties_and_keys():
    w = normal(0, 4, 4)
    data, leaves = structure.describe({"a": w, "b": w, "key": jax.random.key(7)})
    assert set(leaves) == {"a", "key"}
    again = structure.build(data, lambda path, _: leaves[path])
    assert again["a"] is again["b"]
    drawn = [jax.random.normal(k) for k in (again["key"], jax.random.key(7))]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("tree", "error", "words"),
    [
        ({"a": object()}, TypeError, "a is a builtins.object"),
        ({"a": {3: 1}}, ValueError, "key 3 at a"),
        ({"a/b": 1}, ValueError, "'a/b'"),
        ({"a": jax.ShapeDtypeStruct}, TypeError, "a is a builtins.type"),
    ],
)
def test_structure_refuses_what_it_cannot_name(tree, error, words):
    with pytest.raises(error, match=words):
        structure.describe(tree)


def test_structure_loads_classes_of_this_package_only():
    data = {"type": "subprocess.Popen", "data": {}, "static": {}}
    with pytest.raises(ValueError, match="not a class of this package"):
        structure.abstract(data)


@pytest.mark.parametrize("name", EXAMPLES)
def test_round_trip_of_every_weight_type(name, tmp_path):
    model = with_weight(small_model(), "layers.0.attn.q", example(name))
    checkpoint.save(model, tmp_path / "run")
    again = checkpoint.restore(tmp_path / "run")
    assert again.config == model.config
    assert_same_bits(model, again)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_round_trip_of_narrow_types(dtype, tmp_path):
    values = (normal(5, 8, 8) * 3).astype(dtype)
    checkpoint.save(with_weight(small_model(), "head", values), tmp_path / "run")
    again = checkpoint.restore(tmp_path / "run").params["head"]["weight"]
    assert_same_bits(values, again)


def test_a_restored_model_computes_the_same_logits(tmp_path):
    model, tokens = small_model(), jnp.arange(8)[None]
    checkpoint.save(model, tmp_path / "run")
    run = jax.jit(lambda m: m(tokens))
    restored = checkpoint.restore(tmp_path / "run")
    assert_same_bits(run(model), run(restored))


def test_tied_leaf_is_stored_once(tmp_path):
    model = small_model(tied=False)
    table = model.params["embed"]["weight"]
    tied = with_weight(model, "head", table)
    checkpoint.save(tied, tmp_path / "tied")
    listed = checkpoint.read_manifest(tmp_path / "tied")["checksums"]
    assert "head/weight" not in listed and "embed/weight" in listed
    params = checkpoint.restore(tmp_path / "tied").params
    assert params["head"]["weight"] is params["embed"]["weight"]


def test_manifest_tells_how_the_model_was_made(tmp_path):
    model = small_model().replace(history=History((halve(2, inner=halve()),)))
    checkpoint.save(model, tmp_path / "run", seeds={"seed": 3}, notes={"run": "x"})
    manifest = checkpoint.read_manifest(tmp_path / "run")
    assert manifest["made_by"] == ["halve(times=2, inner=halve())"]
    assert manifest["seeds"] == {"seed": 3} and manifest["notes"] == {"run": "x"}
    as_record = checkpoint.restore(tmp_path / "run").history.specs
    assert as_record == model.history.specs
    with pytest.raises(TypeError, match="halve is a record"):
        as_record[0](model)
    applied = checkpoint.restore(tmp_path / "run", resolve={"halve": halve}.__getitem__)
    assert applied.history.specs[0](model) is model
    assert recorded("halve")(times=1, inner=None) == halve()


def test_tokenizer_travels_along(tmp_path):
    from jaxllm.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer("builtin:tiny")
    checkpoint.save(small_model(), tmp_path / "with", tokenizer=tokenizer)
    checkpoint.save(small_model(), tmp_path / "without")
    again = checkpoint.restore_tokenizer(tmp_path / "with", load_tokenizer)
    text = "def f(x):\n    return x"
    assert again.encode(text) == tokenizer.encode(text)
    assert checkpoint.restore_tokenizer(tmp_path / "without", load_tokenizer) is None


def test_restores_onto_another_mesh(tmp_path):
    model = with_weight(small_model(), "layers.0.mlp.down", quantized(Integer(4), 12))
    checkpoint.save(model, tmp_path / "run")
    mesh = make_mesh((4, 2), ("data", "tensor"))
    seen = []

    def split_rows(path, leaf):
        seen.append(path)
        fits = leaf.ndim == 2 and leaf.shape[0] % 2 == 0
        return NamedSharding(mesh, P("tensor") if fits else P())

    spread = checkpoint.restore(tmp_path / "run", sharding=split_rows)
    assert "layers.0.mlp.down.weight.planes.0" in seen
    assert spread.params["embed"]["weight"].sharding.spec == P("tensor")
    assert_same_bits(model, spread)
    checkpoint.save(spread, tmp_path / "sharded")
    assert_same_bits(model, checkpoint.restore(tmp_path / "sharded"))
    ruled = checkpoint.restore(tmp_path / "run", mesh=mesh)
    placed = place(model, mesh)
    assert_same_bits(model, ruled)
    pairs = zip(jax.tree.leaves(ruled), jax.tree.leaves(placed), strict=True)
    assert all(a.sharding == b.sharding for a, b in pairs)
    up = ruled.params["layers"]["0"]["mlp"]["up"]["weight"]
    assert up.sharding.spec == P(None, "tensor")


def test_each_bad_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.restore(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.restore(tmp_path / "empty")
    with pytest.raises(ValueError, match="accepted: a local path, gs:// or s3://"):
        checkpoint.restore("ftp://host/run")


def edit_manifest(folder, **changes):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = tmp_path / "run"
    checkpoint.save(small_model(), run)
    sums = checkpoint.read_manifest(run)["checksums"]
    edit_manifest(run, checksums=sums | {"norm/scale": "0" * 16})
    with pytest.raises(ValueError, match="leaf 'norm/scale' has checksum"):
        checkpoint.restore(run)
    checkpoint.restore(run, verify=False)
    edit_manifest(run, format=99)
    with pytest.raises(ValueError, match="format 99, this version reads up to 1"):
        checkpoint.restore(run)
    (run / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest of .* is damaged"):
        checkpoint.restore(run)
    (run / "manifest.json").unlink()
    with pytest.raises(ValueError, match="half-written"):
        checkpoint.restore(run)


def test_arrays_that_are_gone_are_named(tmp_path):
    checkpoint.save(small_model(), tmp_path / "run")
    for file in (tmp_path / "run" / "arrays").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cannot be read|is damaged"):
        checkpoint.restore(tmp_path / "run")


def test_an_interrupted_save_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def fail(folder, record):
        raise KeyboardInterrupt

    checkpoint.save(small_model(), tmp_path / "old")
    monkeypatch.setattr(checkpoint.manifest, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(small_model(), tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(small_model(tied=False), tmp_path / "old", overwrite=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert checkpoint.restore(tmp_path / "old").config.tied


def test_overwriting_is_asked_for(tmp_path):
    checkpoint.save(small_model(), tmp_path / "run")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        checkpoint.save(small_model(), tmp_path / "run")
    checkpoint.save(small_model(tied=False), tmp_path / "run", overwrite=True)
    assert not checkpoint.restore(tmp_path / "run").config.tied


@pytest.mark.parametrize("earlier", [False, True])
def test_what_no_checkpoint_has_is_never_deleted(earlier, tmp_path):
    run = tmp_path / "run"
    if earlier:
        checkpoint.save(small_model(), run)
    (run / "notes").mkdir(parents=True)
    before = sorted(run.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"holds 'notes'.*another folder"):
            checkpoint.save(small_model(tied=False), run, overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == [run, *before]
    (run / "notes").rmdir()
    (run / "manifest.json").unlink(missing_ok=True)
    checkpoint.save(small_model(tied=False), run)
    assert not checkpoint.restore(run).config.tied


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="cannot write to"):
        checkpoint.check_writable(tmp_path / "file")
    with pytest.raises(PermissionError, match="cannot write to"):
        checkpoint.save(small_model(), tmp_path / "file" / "run")
    checkpoint.check_writable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_resume_points(tmp_path):
    store = checkpoint.FolderStore(tmp_path / "points")
    hidden = Stats.of(("gram", "absmax"), normal(1, 5, 4))
    tree = {"hidden": [hidden], "done": 3, "best": 0.5, "weight": quantized(Integer(2))}
    assert store.load("walk") is None
    store.save("walk", {"done": 0})
    store.save("walk", tree)
    again = store.load("walk")
    assert again["done"] == 3 and again["best"] == 0.5
    for part in ("hidden", "weight"):
        assert_same_bits(tree[part], again[part])
    with pytest.raises(ValueError, match="cannot name a resume point"):
        store.save("../out", tree)
    store.clear()
    assert store.load("walk") is None


def test_a_resume_point_survives_a_crash_between_two_renames(tmp_path):
    store = checkpoint.FolderStore(tmp_path)
    store.save("walk", {"done": 1})
    (tmp_path / "walk").rename(tmp_path / ".walk.old")
    assert store.load("walk") == {"done": 1}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


CLOUD = """
import sys, jax, numpy as np, jax.numpy as jnp, pytest, tensorstore as ts
sys.path.insert(0, {tests!r})
import test_checkpoint as t
from jaxllm import checkpoint
from jaxllm.checkpoint import storage
uri = {uri!r}
model = t.with_weight(t.small_model(), "layers.0.attn.q", t.quantized(t.Integer(3), 10))
checkpoint.check_writable(uri)
if uri.startswith("gs:"):  # the emulator must let a write depend on what was read
    kv = ts.KvStore.open(uri + ".twice/").result()
    for value in (b"1", b"2"):
        kv.write("x", value, if_equal=kv.read("x").result().stamp.generation).result()
    assert kv.read("x").result().value == b"2"
with pytest.raises(FileNotFoundError):
    checkpoint.restore(uri)
checkpoint.save(model, uri)
t.assert_same_bits(model, checkpoint.restore(uri))
with pytest.raises(FileExistsError):
    checkpoint.save(model, uri)
checkpoint.save(t.small_model(tied=False), uri, overwrite=True)
assert not checkpoint.restore(uri).config.tied
assert checkpoint.stored_bytes(uri) > 1000
cloud = uri.startswith("s3:") and storage._s3(uri)
cloud = cloud or ts.KvStore.open(uri + "/").result()
cloud["folder/notes"] = b"precious"
for overwrite in (False, True):
    with pytest.raises(FileExistsError, match="holds 'folder'"):
        checkpoint.save(model, uri, overwrite=overwrite)
assert cloud["folder/notes"] == b"precious"
del cloud["folder/notes"], cloud["manifest.json"]  # as an interrupted save leaves it
checkpoint.save(model, uri)
t.assert_same_bits(model, checkpoint.restore(uri))
print("round trip done")
"""


def in_cloud(uri: str, environment: dict) -> None:
    """In a process of its own: endpoints are read when a driver is first loaded."""
    here = os.path.dirname(__file__)
    code = CLOUD.format(tests=here, uri=uri)
    env = os.environ | environment | {"PYTHONPATH": os.path.dirname(here)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert "round trip done" in run.stdout, run.stderr[-3000:]


def wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no server on port {port}")


def name_generations(monkeypatch, server) -> None:
    """Make the emulator's downloads name the object's generation, as the service does.

    Without that header, TensorStore cannot write conditionally to an object that it
    has read, as it does when it looks at a manifest twice (on a slow machine).
    """
    from gcp_storage_emulator.handlers import objects

    plain = objects.download

    def download(request, response, storage, *args):
        plain(request, response, storage, *args)
        name = request.params["bucket_name"], request.params["object_id"]
        if response.status < 400:
            generation = storage.get_file_obj(*name)["generation"]
            response["x-goog-generation"] = generation

    # `objects.get` calls it by its name (for alt=media); the routes hold the function.
    monkeypatch.setattr(objects, "download", download)
    routes = tuple(
        (path, {verb: download if f is plain else f for verb, f in verbs.items()})
        for path, verbs in server.HANDLERS
    )
    monkeypatch.setattr(server, "HANDLERS", routes)


def test_google_cloud_storage(monkeypatch):
    server = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    name_generations(monkeypatch, server)
    port = free_port()
    emulator = server.create_server("127.0.0.1", port, True, default_bucket="bucket")
    emulator.start()
    try:
        url = f"http://127.0.0.1:{port}"
        names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
        names = dict.fromkeys(names, url)
        in_cloud("gs://bucket/runs/a", names | {"NO_GCE_CHECK": "true"})
    finally:
        emulator.stop()


def test_s3():
    server = pytest.importorskip("moto.server")
    port = free_port()
    threaded = server.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    threaded.start()
    try:
        wait_for(port)
        url = f"http://127.0.0.1:{port}"
        boto3 = pytest.importorskip("boto3")
        login = {"aws_access_key_id": "x", "aws_secret_access_key": "x"}
        region = {"region_name": "us-east-1", "endpoint_url": url}
        boto3.client("s3", **login, **region).create_bucket(Bucket="bucket")
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        place = {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}
        in_cloud("s3://bucket/runs/a", keys | place)
    finally:
        threaded.stop()
