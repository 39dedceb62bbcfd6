"""The contract of loss terms, and which metrics a fit reports for them. Imports no torch.

A term is a module `(outputs, batch) -> (total, weight)`: a sum and what it is a sum over, never the
mean. Optional attributes, of the term or of its class:

* ``whole_batch``: names of the outputs that the term must see of the whole batch at once.
* ``refresh(epoch, predict)``: a pass over the training set before an epoch; returns metrics.
* ``reports``: names of the metrics that ``refresh`` returns.
"""

from collections.abc import Mapping
from typing import Any, Protocol


class Weighted(Protocol):
    """The settings of a term, that this module reads."""

    weight: float


def whole_batch_outputs(term: Any) -> tuple[str, ...]:
    """Names of the outputs that a term reads of the whole batch at once; empty for most terms."""
    found: tuple[str, ...] = getattr(term, "whole_batch", ())
    return found


def per_sample(term: Any) -> bool:
    """Whether a term needs neither the whole batch nor the whole training set.

    Only such a term means the same on another split.
    """
    return not whole_batch_outputs(term) and not hasattr(term, "refresh")


def refresh_metrics(terms: Mapping[str, Any]) -> list[str] | None:
    """Names of the metrics from `refresh`; None when a term does not list them in `reports`."""
    refreshed = [term for term in terms.values() if hasattr(term, "refresh")]
    if not all(hasattr(term, "reports") for term in refreshed):
        return None
    return [name for term in refreshed for name in term.reports]


def metric_names(terms: Mapping[str, Any]) -> list[str] | None:
    """Names of the metrics of a fit with these terms, without those of its own ``metrics``.

    None when a term does not list what it reports.
    """
    refreshed = refresh_metrics(terms)
    if refreshed is None:
        return None
    evaluated = [name for name, term in terms.items() if per_sample(term)]
    train = ["train_loss", *(f"train_{name}" for name in terms), "lr"]
    val = ["val_loss", *(f"val_{name}" for name in evaluated)] if evaluated else []
    return train + val + refreshed


def disabled_metrics(terms: Mapping[str, Any], weights: Mapping[str, Weighted]) -> set[str]:
    """Names of the metrics that are missing because their term has weight 0.

    An ablation that turns a term off need not also remove the early-stopping rule that reads it.
    """
    off = {name: term for name, term in terms.items() if weights[name].weight == 0}
    on = {name: term for name, term in terms.items() if name not in off}
    return set(metric_names(off) or ()) - set(metric_names(on) or ())
