"""Sources of counts: a table in memory, or an `.h5ad` file whose rows are read on demand."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
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
from stagesweep.data.duplicates import check_duplicates, unique_names

IntArray = NDArray[np.int64]
# Reading up to this many unwanted rows is cheaper than another request to the file.
MAX_GAP = 16
CHUNK_ROWS = 4096  # rows in memory at a time, when a whole file is scanned


class CountSource(Protocol):
    """Counts (n, g) of cells, and the annotation `obs` of each cell.

    Error messages use `name`, and `count_layer`: a layer of the same file that holds counts.
    """

    name: str
    genes: list[str]
    obs: pd.DataFrame
    count_layer: str | None

    def take(self, rows: IntArray) -> csr_matrix:
        """Return the counts (r, g) of some cells, in the order of `rows`, fp32."""
        ...


@dataclass
class CountTable:
    """Counts in memory."""

    name: str
    genes: list[str]
    obs: pd.DataFrame
    counts: csr_matrix
    count_layer: str | None = None

    def take(self, rows: IntArray) -> csr_matrix:
        """Return the counts (r, g) of some cells."""
        return self.counts[rows]


def read_h5ad(path: str, layer: str | None = None) -> CountTable:
    """Read a whole `.h5ad` file; `layer` is null for X, `raw` for raw.X, or one of its layers.

    Raises UserError if the file is not valid, or has no such layer.
    """
    with optional_dependency():
        import anndata
    with readable(path):
        cells = anndata.read_h5ad(path)
        parts: dict[str, Any] = {
            name: (values, cells.var_names) for name, values in cells.layers.items()
        }
        if cells.raw is not None:
            parts["raw"] = (cells.raw.X, cells.raw.var_names)
        layers = parts.items()
        count_layer = next((name for name, (values, _) in layers if are_counts(values[:10])), None)
        if layer is not None:
            require_layer(layer, list(parts), path)
        values, genes = (cells.X, cells.var_names) if layer is None else parts[layer]
        if values is None:
            raise UserError(
                f"{path} has no X; name the layer that holds counts with data.layer=..."
            )
        counts = checked(csr_matrix(values, dtype=np.float32), len(cells.obs), len(genes))
    return CountTable(path, [str(gene) for gene in genes], cells.obs, counts, count_layer)


class BackedFile:
    """An `.h5ad` file whose rows are read on demand.

    Only the row pointers of the counts are in memory. Every process opens the file itself.
    Arguments and errors are those of `read_h5ad`.
    """

    def __init__(self, path: str, layer: str | None = None) -> None:
        self.name = path
        self._group = {None: "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
        self._handle: tuple[int, Any] = (0, None)
        with readable(path):
            self._open(path, layer)

    def _open(self, path: str, layer: str | None) -> None:
        with optional_dependency():
            from anndata.io import read_elem
        root = self._root()
        layers = {name: root["layers"][name] for name in root.get("layers", ())}
        layers |= {"raw": root["raw/X"]} if "raw/X" in root else {}
        if layer is not None:
            require_layer(layer, list(layers), path)
        self.count_layer = next(
            (name for name, each in layers.items() if are_counts(first_values(each))), None
        )
        self.obs: pd.DataFrame = read_elem(root["obs"])
        var = read_elem(root["raw/var" if layer == "raw" else "var"])
        self.genes = [str(gene) for gene in var.index]
        kind = str(root[self._group].attrs.get("encoding-type", "array"))
        if kind == "csc_matrix":
            raise UserError(
                f"{path} is stored gene by gene (CSC), so its cells cannot be read one by one; "
                "set data.backed=false, or write it with X in CSR"
            )
        sparse = kind == "csr_matrix"
        self._pointers = root[self._group]["indptr"][:].astype(np.int64) if sparse else None
        rows = len(root[self._group] if self._pointers is None else self._pointers[1:])
        if rows != len(self.obs):
            raise UserError(
                f"{path} is damaged: it has {rows} rows of counts, and {len(self.obs)} cells"
            )

    def __getstate__(self) -> dict[str, Any]:
        """The state without the file handle, for worker processes."""
        return self.__dict__ | {"_handle": (0, None)}

    def take(self, rows: IntArray) -> csr_matrix:
        """Return the counts (r, g) of some cells, reading neighbouring rows together."""
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) > MAX_GAP) + 1)
        with readable(self.name):
            found = vstack([self._read(run[0], run[-1] + 1)[run - run[0]] for run in runs], "csr")
        return found[np.argsort(order)]

    def _read(self, first: int, last: int) -> csr_matrix:
        matrix, width = self._root()[self._group], len(self.genes)
        if self._pointers is None:
            dense = csr_matrix(matrix[first:last].astype(np.float32))
            return checked(dense, last - first, width)
        start, stop = self._pointers[first], self._pointers[last]
        values = matrix["data"][start:stop].astype(np.float32)
        pointers = self._pointers[first : last + 1] - start
        sparse = csr_matrix(
            (values, matrix["indices"][start:stop], pointers), (last - first, width)
        )
        return checked(sparse, last - first, width)

    def _root(self) -> Any:
        """The open file; a forked process opens it again, because handles do not survive a fork."""
        process, root = self._handle
        if process != os.getpid():
            with optional_dependency():
                import h5py
            root = h5py.File(self.name, "r")
            if not {"X", "obs", "var"} <= set(root) or not root["obs"].attrs.get("encoding-type"):
                raise UserError(
                    f"{self.name} lacks X, obs or var as anndata 0.7 or newer writes them; set "
                    "data.backed=false, or rewrite it with anndata"
                )
            self._handle = (os.getpid(), root)
        return root


class MergedGenes:
    """Another source, with the counts of genes of one name summed."""

    def __init__(self, source: CountSource) -> None:
        codes, names = pd.factorize(np.array(source.genes, dtype=object))
        self.name, self.obs, self.count_layer = source.name, source.obs, source.count_layer
        self.genes = [str(name) for name in names]
        ones = np.ones(len(codes), np.float32)
        self._source = source
        self._sum = csr_matrix((ones, (np.arange(len(codes)), codes)))

    def take(self, rows: IntArray) -> csr_matrix:
        """Return the counts (r, g) of some cells."""
        merged = csr_matrix(self._source.take(rows) @ self._sum)
        merged.sort_indices()
        return merged


def resolve_genes(source: CountSource, choice: str) -> CountSource:
    """Refuse genes whose name occurs twice, number them (unique), or sum their counts (merge)."""
    genes = pd.Series(source.genes, dtype=object)
    where = f"the genes of {source.name}"
    check_duplicates(genes, choice, where, "data.duplicate_genes", ("unique", "merge"))
    if not genes.duplicated().any():
        return source
    if choice == "unique":
        unique = copy(source)
        unique.genes = unique_names(source.genes)
        return unique
    merged = MergedGenes(source)
    if isinstance(source, CountTable):
        counts = merged.take(np.arange(len(source.obs)))
        return CountTable(source.name, merged.genes, source.obs, counts, source.count_layer)
    return merged


@contextmanager
def optional_dependency() -> Iterator[None]:
    """Context for imports of the extra `singlecell`; raises UserError if a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"this data set needs {error.name}, which is not installed: "
            'pip install "stagesweep[singlecell]"'
        ) from error


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Context for reading a file; UserError names it when it is damaged or foreign."""
    try:
        # Warnings: files of older anndata versions are fine, and values are checked later.
        with warnings.catch_warnings(action="ignore"):
            yield
    except UserError:
        raise
    except Exception as error:  # h5py and anndata raise many kinds
        raise UserError(
            f"{path} is not a readable .h5ad file (anndata): {one_line(error)}"
        ) from error


def checked(counts: csr_matrix, cells: int, genes: int) -> csr_matrix:
    """The counts; ValueError unless their shape and all their indices are those of the file."""
    if counts.shape != (cells, genes):
        raise ValueError(f"counts of shape {counts.shape} of {cells} cells and {genes} genes")
    counts.check_format(full_check=True)
    return counts


def require_layer(layer: str, layers: list[str], source: str) -> None:
    """Raise UserError if a layer does not exist, naming the nearest one."""
    if layer not in layers:
        near = get_close_matches(layer, layers, n=1, cutoff=0)
        hint = f"; the nearest is {near[0]!r}" if near else ", which has none"
        raise UserError(f"no layer {layer!r} in {source}{hint} (data.layer)")


def first_values(values: Any) -> Any:
    """The first values of a layer of an open file."""
    return values["data"][:1000] if "data" in getattr(values, "keys", tuple)() else values[:10]


def are_counts(values: Any) -> bool:
    """Whether all values, sparse or dense, are non-negative integers."""
    numbers = values.data if issparse(values) else np.asarray(values)
    return bool(np.all((numbers >= 0) & (numbers == np.round(numbers))))


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())[:200]


def chunks(source: CountSource, rows: IntArray) -> Iterator[csr_matrix]:
    """Iterate over the counts of many cells, 4,096 rows at a time."""
    for start in range(0, len(rows), CHUNK_ROWS):
        yield source.take(rows[start : start + CHUNK_ROWS])


def pbmc68k() -> CountTable:
    """Load 700 peripheral blood cells of 10x Genomics (Zheng et al. 2017) from scanpy's package.

    The file holds log-normalised values of 765 genes. Counts are round(expm1(raw) * n_counts /
    1e4); no value is more than 0.08 away from an integer. Cell types are in `bulk_labels`.
    """
    spec = find_spec("scanpy")  # importing it takes seconds
    if spec is None or spec.origin is None:
        raise UserError(
            'data=pbmc68k is part of scanpy, which is not installed: pip install "stagesweep'
            '[singlecell]"'
        )
    path = Path(spec.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad"
    table = read_h5ad(str(path), layer="raw")
    total = table.obs["n_counts"].to_numpy(np.float64)
    counts = table.counts.astype(np.float64)
    counts.data = np.round(np.expm1(counts.data) * np.repeat(total, np.diff(counts.indptr)) / 1e4)
    counts.eliminate_zeros()
    return CountTable("scanpy's pbmc68k_reduced", table.genes, table.obs, counts.astype(np.float32))
