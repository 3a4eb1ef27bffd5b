"""The Hugging Face hub: streamed data sets and tokenizer files, with clear errors."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.data.corpora import Corpus, text_of

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def stream(name: str, split: str, field: str) -> Corpus:
    """A hub data set's split, streamed: nothing is downloaded ahead of the reader.

    Args:
      name: `owner/name`, or `owner/name/config`, or `name` of an old data set.
      split: A split name of the data set ("train", "validation", ...).
      field: The column that holds the text.

    Raises:
      ConnectionError: No network, no such data set, or no permission.
      ValueError: Unknown split or column.
    """
    path, config = _parse(name)
    version = _revision(path)
    title = f"hf:{name}[{split}, {field}]"

    def read() -> Iterator[str]:
        import datasets

        rows = datasets.load_dataset(
            path, config, split=split, streaming=True, revision=version
        )
        for row in rows:
            yield text_of(row, field, title)

    return Corpus(title, read, version=version)


def download_tokenizer(source: str) -> str:
    """Fetches only the tokenizer's files of a hub model; returns their folder."""
    import huggingface_hub

    name = source.removeprefix("hf:").removeprefix("//")
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=TOKENIZER_FILES)
    except Exception as error:
        raise _unreachable(f"tokenizer of {name!r}", error) from error


def _parse(name: str) -> tuple[str, str | None]:
    parts = name.strip("/").split("/", 2)
    if not parts[0]:
        raise ValueError("'hf:' needs the name of a data set: hf:owner/name[/config]")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def _revision(path: str) -> str:
    """The commit of the data set, which pins what every later pass reads."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(path, timeout=20).sha
    except Exception as error:
        raise _unreachable(f"data set {path!r}", error) from error


def _unreachable(what: str, error: Exception) -> ConnectionError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ConnectionError(
        f"cannot reach the {what} on the hub ({reason}); check the name and the "
        "network, or use a local file or 'builtin:'"
    )
