"""The fixtures of `fits`."""

from fits import bench, make_batch, make_term, open_bench, tiny  # noqa: F401
