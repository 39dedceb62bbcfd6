"""What a loss term says of itself, and so which numbers a fit will have. Imports no torch.

All that is asked here are attributes, of a term or of its class.
"""

from collections.abc import Mapping
from typing import Any

from stagesweep.config import schema


def reads(term: Any) -> tuple[str, ...]:
    """The outputs that a term must see of the whole batch at once; none for most terms."""
    found: tuple[str, ...] = getattr(term, "whole_batch", ())
    return found


def per_sample(term: Any) -> bool:
    """Whether a term needs neither the whole batch nor the whole training set, and so means the
    same on another split.
    """
    return not reads(term) and not hasattr(term, "refresh")


def reports(terms: Mapping[str, Any]) -> list[str] | None:
    """What the `refresh` of these terms measures; None when one does not name it in `reports`."""
    refreshed = [term for term in terms.values() if hasattr(term, "refresh")]
    if not all(hasattr(term, "reports") for term in refreshed):
        return None
    return [name for term in refreshed for name in term.reports]


def metric_names(terms: Mapping[str, Any]) -> list[str] | None:
    """The numbers of a fit in which these terms act, those of `metrics` aside.

    None when a term does not tell what it adds to them.
    """
    reported = reports(terms)
    if reported is None:
        return None
    evaluated = [name for name, term in terms.items() if per_sample(term)]
    train = ["train_loss", *(f"train_{name}" for name in terms), "lr"]
    val = ["val_loss", *(f"val_{name}" for name in evaluated)] if evaluated else []
    return train + val + reported


def silent(terms: Mapping[str, Any], weights: Mapping[str, schema.Weight]) -> set[str]:
    """The numbers that are missing because the weight of their term is 0.

    Whoever turns a term off (in an ablation, say) should not have to take away the rule that stops
    on it as well.
    """
    off = {name: term for name, term in terms.items() if weights[name].weight == 0}
    on = {name: term for name, term in terms.items() if name not in off}
    return set(metric_names(off) or ()) - set(metric_names(on) or ())
