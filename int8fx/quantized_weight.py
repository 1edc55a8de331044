"""The name under which older pickles find int8 weights."""

from int8fx.weights.tensor import Int8Weight, _rebuild, _rebuild_packed

__all__ = ["Int8Weight", "_rebuild", "_rebuild_packed"]
