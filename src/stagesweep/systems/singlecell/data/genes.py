"""Quality control of cells and genes: validation, filters and highly variable genes."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from stagesweep.base.errors import UserError
from stagesweep.systems.singlecell.data.h5ad import CountSource, IntArray, chunks

# Genes are ranked by at most this many training cells, drawn at random.
MAX_RANKING_CELLS = 20_000
THETA = 100.0


def check_counts(counts: csr_matrix, source: CountSource) -> None:
    """Raise UserError unless all values are counts. The message names a layer that holds counts."""
    values = counts.data
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        gene = source.genes[counts.indices[first]]
        raise UserError(f"{source.name} holds {values[first]} (gene {gene!r}); fix that file")
    if values.min(initial=0) < 0:
        raise UserError(
            f"{source.name} holds negative values, not counts (scaled data?); {_remedy(source)}"
        )
    if np.any(values != np.round(values)):
        kind = "log-transformed values" if values.max() < 20 else "values that are not whole"
        raise UserError(f"{source.name} holds {kind}, not counts; {_remedy(source)}")


def _remedy(source: CountSource) -> str:
    if (layer := source.count_layer) is not None:
        return f"its layer {layer!r} holds counts: data.layer={layer}"
    return "none of its layers holds counts: give a file with raw counts"


def cell_qc_metrics(source: CountSource) -> tuple[IntArray, NDArray[np.float64]]:
    """Return the number of genes detected in each cell (n,) and its total counts (n,).

    Reads every value once. Raises UserError at values that are not counts.
    """
    detected, totals = [], []
    for counts in chunks(source, np.arange(len(source.obs))):
        check_counts(counts, source)
        detected.append(np.diff(counts.indptr))
        totals.append(np.asarray(counts.sum(axis=1), np.float64).ravel())
    return np.concatenate(detected).astype(np.int64), np.concatenate(totals)


def cells_per_gene(source: CountSource, rows: IntArray) -> IntArray:
    """Return the number of the given cells in which each gene is detected, (g,)."""
    found = np.zeros(len(source.genes), np.int64)
    for counts in chunks(source, rows):
        found += np.bincount(counts.indices[counts.data > 0], minlength=len(found))
    return found


def pearson_residual_variance(
    source: CountSource, rows: IntArray, genes: IntArray, seed: int
) -> NDArray[np.float64]:
    """Return the variance (g,) of Pearson residuals of the given genes (Lause et al. 2021).

    The model is negative binomial with theta 100 and mean library size x share of the gene.
    Residuals are clipped at the square root of the number of cells. The result is that of scanpy's
    flavour `pearson_residuals`. Of more than 20,000 cells a random sample is used.
    """
    if len(rows) > MAX_RANKING_CELLS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_RANKING_CELLS, replace=False))
    share = np.zeros(len(genes))
    for counts in chunks(source, rows):
        share += np.asarray(counts[:, genes].sum(axis=0), np.float64).ravel()
    share /= share.sum()
    total, squares = np.zeros((2, len(genes)))
    for counts in chunks(source, rows):
        dense = counts[:, genes].toarray().astype(np.float64)
        mean = dense.sum(axis=1, keepdims=True) * share
        spread = np.sqrt(mean + mean**2 / THETA)
        residual = np.divide(dense - mean, spread, np.zeros_like(mean), where=spread > 0)
        residual = residual.clip(-np.sqrt(len(rows)), np.sqrt(len(rows)))
        total += residual.sum(axis=0)
        squares += (residual**2).sum(axis=0)
    variance: NDArray[np.float64] = squares / len(rows) - (total / len(rows)) ** 2
    return variance
