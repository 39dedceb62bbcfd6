from types import SimpleNamespace
from typing import Any

from stagesweep.base.terms import (
    disabled_metrics,
    metric_names,
    per_sample,
    refresh_metrics,
    whole_batch_outputs,
)


class Plain:
    pass


class Coupled:
    whole_batch = ("mean",)


class Refreshed:
    reports = ("moved",)

    def refresh(self, epoch: int, predict: Any) -> dict[str, float]:
        return {"moved": 0.0}


class Unlisted:
    def refresh(self, epoch: int, predict: Any) -> dict[str, float]:
        return {}


def test_only_plain_terms_are_evaluated() -> None:
    assert [per_sample(term) for term in (Plain, Coupled, Refreshed())] == [True, False, False]
    assert whole_batch_outputs(Coupled) == ("mean",)
    assert metric_names({"a": Plain, "b": Coupled, "c": Refreshed}) == [
        "train_loss", "train_a", "train_b", "train_c", "lr", "val_loss", "val_a", "moved",
    ]  # fmt: skip
    assert metric_names({"b": Coupled}) == ["train_loss", "train_b", "lr"]


def test_unlisted_metrics_of_a_term_are_unknown() -> None:
    terms = {"a": Plain, "c": Unlisted}
    assert refresh_metrics(terms) is None
    assert metric_names(terms) is None


def test_a_term_of_weight_0_disables_its_metrics() -> None:
    terms = {"a": Plain, "c": Refreshed}
    weights = {"a": SimpleNamespace(weight=1.0), "c": SimpleNamespace(weight=0.0)}
    assert disabled_metrics(terms, weights) == {"train_c", "moved"}
