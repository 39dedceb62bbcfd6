"""Enrichment: labels that are more frequent in a cluster than expected by chance."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, hypergeom

COLUMNS = ["cluster", "label", "observed", "expected", "fold", "p", "q"]


def enrichment(
    clusters: NDArray[np.integer],
    labels: NDArray[np.integer],
    names: Sequence[str],
    *,
    smallest: int = 2,
) -> pd.DataFrame:
    """Test each label with at least `smallest` samples in each cluster.

    `clusters` and `labels` are (n,); labels index `names`. Samples with a label below 0 have none
    and stay in the background. p is the hypergeometric probability of the observed count or more;
    q is p after Benjamini & Hochberg 1995, over all pairs tested. Returns cluster, label, observed,
    expected, fold, p, q, sorted by q.
    """
    sizes = np.bincount(clusters)
    counts = np.zeros((len(sizes), len(names)), dtype=np.int64)
    np.add.at(counts, (clusters[labels >= 0], labels[labels >= 0]), 1)
    totals = counts.sum(axis=0)
    tested = [
        (cluster, label)
        for cluster in np.flatnonzero(sizes)
        for label in np.flatnonzero(totals >= smallest)
    ]
    if not tested:
        return pd.DataFrame(columns=COLUMNS)
    cluster, label = np.array(tested).T
    observed = counts[cluster, label]
    expected = sizes[cluster] * totals[label] / len(clusters)
    p = hypergeom.sf(observed - 1, len(clusters), totals[label], sizes[cluster])
    table = pd.DataFrame(
        {
            "cluster": cluster,
            "label": np.asarray(names, dtype=object)[label],
            "observed": observed,
            "expected": expected,
            "fold": observed / expected,
            "p": p,
            "q": false_discovery_control(p.clip(0, 1), method="bh"),
        }
    )
    return table.sort_values(["q", "p", "cluster", "label"], ignore_index=True)
