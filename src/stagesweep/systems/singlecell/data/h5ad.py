"""Counts of cells: a table in memory, or an `.h5ad` file of which rows are read when asked for."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, issparse, vstack

from stagesweep.base.errors import UserError

Codes = NDArray[np.int64]
# Rows in between that are cheaper to read than another request to the file is.
GAP = 16
ROWS = 4096  # read at once where all are looked at


class Source(Protocol):
    """Counts (n, g) of cells and what is known of each: `name` is for messages, and `counted` a
    layer of the same file that holds counts, in case these are none.
    """

    name: str
    genes: list[str]
    obs: pd.DataFrame
    counted: str | None

    def take(self, rows: Codes) -> csr_matrix:
        """The counts (r, g) of some cells, in the order of `rows`, fp32."""
        ...


@dataclass
class Table:
    """Counts in memory."""

    name: str
    genes: list[str]
    obs: pd.DataFrame
    counts: csr_matrix
    counted: str | None = None

    def take(self, rows: Codes) -> csr_matrix:
        """The counts (r, g) of some cells."""
        return self.counts[rows]


def read_table(path: str, layer: str | None = None) -> Table:
    """Read a whole `.h5ad` file; `layer` is null for X, `raw` for raw.X, or one of its layers.

    Raises UserError when it is no such file, or has no such layer.
    """
    with extra():
        import anndata
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files of older versions are read all the same
        try:
            cells = anndata.read_h5ad(path)
        except Exception as error:  # whatever h5py and anndata make of a file that is none
            raise UserError(
                f"{path} is no readable .h5ad file (anndata): {one_line(error)}"
            ) from error
    parts: dict[str, Any] = {
        name: (values, cells.var_names) for name, values in cells.layers.items()
    }
    if cells.raw is not None:
        parts["raw"] = (cells.raw.X, cells.raw.var_names)
    counted = next((name for name, (values, _) in parts.items() if whole(values[:10])), None)
    if layer is not None:
        require_layer(layer, list(parts), path)
    values, genes = (cells.X, cells.var_names) if layer is None else parts[layer]
    if values is None:
        raise UserError(f"{path} has no X; name the layer that holds counts with data.layer=...")
    counts = csr_matrix(values, dtype=np.float32)
    return Table(path, [str(gene) for gene in genes], cells.obs, counts, counted)


class File:
    """An `.h5ad` file of which rows are read when asked for: of the counts only the row pointers
    are in memory. Every process opens the file for itself. Arguments and errors as `read_table`.
    """

    def __init__(self, path: str, layer: str | None = None) -> None:
        self.name = path
        self._part = {None: "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
        self._open: tuple[int, Any] = (0, None)
        with extra():
            from anndata.io import read_elem
        root = self._root()
        layers = {name: root["layers"][name] for name in root.get("layers", ())}
        layers |= {"raw": root["raw/X"]} if "raw/X" in root else {}
        if layer is not None:
            require_layer(layer, list(layers), path)
        self.counted = next((name for name, each in layers.items() if whole(head(each))), None)
        self.obs: pd.DataFrame = read_elem(root["obs"])
        var = read_elem(root["raw/var" if layer == "raw" else "var"])
        self.genes = [str(gene) for gene in var.index]
        kind = str(root[self._part].attrs.get("encoding-type", "array"))
        if kind == "csc_matrix":
            raise UserError(
                f"{path} is stored gene by gene (CSC), so that its cells cannot be read one by "
                "one; set data.backed=false, or write it with X in CSR"
            )
        sparse = kind == "csr_matrix"
        self._pointers = root[self._part]["indptr"][:].astype(np.int64) if sparse else None

    def __getstate__(self) -> dict[str, Any]:
        """All but the open file: for worker processes."""
        return self.__dict__ | {"_open": (0, None)}

    def take(self, rows: Codes) -> csr_matrix:
        """The counts (r, g) of some cells, read in runs of neighbours."""
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > GAP) + 1)
        found = vstack([self._read(run[0], run[-1] + 1)[run - run[0]] for run in runs], "csr")
        return found[np.argsort(order)]

    def _read(self, first: int, last: int) -> csr_matrix:
        matrix, width = self._root()[self._part], len(self.genes)
        if self._pointers is None:
            return csr_matrix(matrix[first:last].astype(np.float32))
        start, stop = self._pointers[first], self._pointers[last]
        values = matrix["data"][start:stop].astype(np.float32)
        pointers = self._pointers[first : last + 1] - start
        return csr_matrix((values, matrix["indices"][start:stop], pointers), (last - first, width))

    def _root(self) -> Any:
        """The open file. A handle does not outlive a fork."""
        process, root = self._open
        if process != os.getpid():
            with extra():
                import h5py
            try:
                root = h5py.File(self.name, "r")
            except OSError as error:
                raise UserError(f"{self.name} is no readable .h5ad file (HDF5)") from error
            if not {"X", "obs", "var"} <= set(root) or not root["obs"].attrs.get("encoding-type"):
                raise UserError(
                    f"{self.name} lacks X, obs or var as anndata 0.7 or newer writes them; set "
                    "data.backed=false, or write it anew with anndata"
                )
            self._open = (os.getpid(), root)
        return root


@contextmanager
def extra() -> Iterator[None]:
    """Where what the extra brings is imported; UserError when it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"this data set needs {error.name}, which is not installed: "
            'pip install "stagesweep[singlecell]"'
        ) from error


def require_layer(layer: str, layers: list[str], source: str) -> None:
    """Raise UserError unless a layer is there, naming the nearest one that is."""
    if layer not in layers:
        near = get_close_matches(layer, layers, n=1, cutoff=0)
        hint = f"; the nearest is {near[0]!r}" if near else ", which has none"
        raise UserError(f"no layer {layer!r} in {source}{hint} (data.layer)")


def head(values: Any) -> Any:
    """The first values of a layer of an open file."""
    return values["data"][:1000] if "data" in getattr(values, "keys", tuple)() else values[:10]


def whole(values: Any) -> bool:
    """Whether values, sparse or not, are those of counts."""
    numbers = values.data if issparse(values) else np.asarray(values)
    return bool(np.all((numbers >= 0) & (numbers == np.round(numbers))))


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())[:200]


def pieces(source: Source, rows: Codes) -> Iterator[csr_matrix]:
    """The counts of many cells, some thousand at a time."""
    for start in range(0, len(rows), ROWS):
        yield source.take(rows[start : start + ROWS])


def pbmc68k() -> Table:
    """700 peripheral blood cells of 10x Genomics (Zheng et al. 2017), from scanpy's own package.

    It holds log-normalised values of 765 genes; counts = round(expm1(raw) * n_counts / 1e4), where
    the largest value is 0.08 away from a whole number. Cell types are in `bulk_labels`.
    """
    spec = find_spec("scanpy")  # importing it takes seconds
    if spec is None or spec.origin is None:
        raise UserError(
            'data=pbmc68k is part of scanpy, which is not installed: pip install "stagesweep'
            '[singlecell]"'
        )
    path = Path(spec.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"
    table = read_table(str(path), layer="raw")
    total = table.obs["n_counts"].to_numpy(np.float64)
    counts = table.counts.astype(np.float64)
    counts.data = np.round(np.expm1(counts.data) * np.repeat(total, np.diff(counts.indptr)) / 1e4)
    counts.eliminate_zeros()
    return Table("scanpy's pbmc68k_reduced", table.genes, table.obs, counts.astype(np.float32))
