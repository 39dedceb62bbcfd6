"""Which cells and genes are kept: checks, filters and highly variable genes."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from stagesweep.base.errors import UserError
from stagesweep.systems.singlecell.data.h5ad import Codes, Source, pieces

# Training cells that genes are ranked by; a random sample of this many stands for more.
RANKED = 20_000
THETA = 100.0


def check(counts: csr_matrix, source: Source) -> None:
    """Raise UserError unless values are counts, naming a layer that holds some."""
    values = counts.data
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(~np.isfinite(values))[0])
        gene = source.genes[counts.indices[place]]
        raise UserError(f"{source.name} holds {values[place]} (gene {gene!r}); mend that file")
    if values.min(initial=0) < 0:
        raise UserError(
            f"{source.name} holds negative values, so no counts (scaled data?); {_remedy(source)}"
        )
    if np.any(values != np.round(values)):
        kind = "log-transformed values" if values.max() < 20 else "values that are not whole"
        raise UserError(f"{source.name} holds {kind}, not counts; {_remedy(source)}")


def _remedy(source: Source) -> str:
    if (layer := source.counted) is not None:
        return f"its layer {layer!r} holds counts: data.layer={layer}"
    return "none of its layers holds counts: give a file with raw counts"


def survey(source: Source) -> tuple[Codes, NDArray[np.float64]]:
    """Look at every value once: genes found in each cell (n,), counts of each cell (n,).

    Raises UserError at values that are no counts.
    """
    found, totals = [], []
    for counts in pieces(source, np.arange(len(source.obs))):
        check(counts, source)
        found.append(np.diff(counts.indptr))
        totals.append(np.asarray(counts.sum(axis=1), np.float64).ravel())
    return np.concatenate(found).astype(np.int64), np.concatenate(totals)


def cells_with(source: Source, rows: Codes) -> Codes:
    """In how many of some cells each gene is found, (g,)."""
    found = np.zeros(len(source.genes), np.int64)
    for counts in pieces(source, rows):
        found += np.bincount(counts.indices[counts.data > 0], minlength=len(found))
    return found


def residual_variance(source: Source, rows: Codes, genes: Codes, seed: int) -> NDArray[np.float64]:
    """Variance (g,) of the Pearson residuals of some genes in some cells (Lause et al. 2021).

    Residuals of a negative binomial with theta 100 around library size x share of the gene,
    clipped at the root of the number of cells; the same as scanpy's flavour `pearson_residuals`.
    A random 20,000 of more cells stand for all.
    """
    if len(rows) > RANKED:
        rows = np.sort(np.random.default_rng(seed).choice(rows, RANKED, replace=False))
    share = np.zeros(len(genes))
    for counts in pieces(source, rows):
        share += np.asarray(counts[:, genes].sum(axis=0), np.float64).ravel()
    share /= share.sum()
    total, squares = np.zeros((2, len(genes)))
    for counts in pieces(source, rows):
        dense = counts[:, genes].toarray().astype(np.float64)
        mean = dense.sum(axis=1, keepdims=True) * share
        spread = np.sqrt(mean + mean**2 / THETA)
        residual = np.divide(dense - mean, spread, np.zeros_like(mean), where=spread > 0)
        residual = residual.clip(-np.sqrt(len(rows)), np.sqrt(len(rows)))
        total += residual.sum(axis=0)
        squares += (residual**2).sum(axis=0)
    variance: NDArray[np.float64] = squares / len(rows) - (total / len(rows)) ** 2
    return variance
