"""Meshes and sharding rules: where the leaves of a model live."""

from jaxllm.distributed.sharding import RULES, make_mesh, place, shardings

__all__ = ["RULES", "make_mesh", "place", "shardings"]
