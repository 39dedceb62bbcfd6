"""The stage that trains and scores anew for each fold."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from stagesweep.base.errors import UserError
from stagesweep.base.view import View
from stagesweep.config import schema
from stagesweep.core.predict import metric_inputs, predict
from stagesweep.metric.interval import mean_interval

if TYPE_CHECKING:
    from stagesweep.run.context import Run

Array = NDArray[Any]
Arrays = dict[str, Array]
Codes = NDArray[np.int64]


@dataclass
class CrossValidate(schema.CrossValidate):
    """Train a new model for each fold of the pooled `splits` and score it on that fold.

    All samples of a `group` are in one fold, and folds have about equal shares of `stratify`
    (scikit-learn's StratifiedGroupKFold). The rest is divided in the same way once more: what
    chooses the epoch is never what is reported. A model that learns scales or chooses genes
    (``adapt``) sees only what it is fitted to; what the data set itself has learnt from its own
    training split stays as it is. Baselines see all but the fold. Where only one group is left to
    learn from, its samples are divided.

    Leaves ``folds.csv`` (a row for each method and fold), ``cross_validation.csv`` (mean and 95 %
    interval over folds) and ``out_of_fold.npz``: the `fold` and `row` of each sample in the pooled
    data, and ``<method>/<array>`` for what the metrics read.
    """

    def __call__(self, run: "Run") -> dict[str, float]:
        """Return ``<score>`` of the model, its ``_low`` and ``_high``, and ``<method>_<score>``."""
        if self.fit is None:
            raise UserError(f"stage.{run.stage}.fit is not set: say how a model is trained")
        run.turn_to(self.fit.part, self.fit.view)
        first, *others = (run.data.split(split) for split in self.splits)
        pool = first.join(others)
        rows: list[dict[str, Any]] = []
        found: list[Arrays] = []
        for number, (rest, fold) in enumerate(self.deal(run, pool, self.folds, self.group), 1):
            methods = self.methods(run, pool, rest, fold, f"fold_{number}")
            for method, arrays in methods.items():
                scores = self.scores(arrays)
                rows.append({"method": method, "fold": number, "n": len(fold)} | scores)
            each = {f"{m}/{name}": a for m, own in methods.items() for name, a in own.items()}
            found.append({"row": fold, "fold": np.full(len(fold), number)} | each)
        table = pd.DataFrame(rows)
        run.save("folds.csv", table)
        order = np.argsort(np.concatenate([part["row"] for part in found]))
        whole = {name: np.concatenate([p[name] for p in found])[order] for name in found[0]}
        run.save("out_of_fold.npz", whole)
        run.forget_checkpoints()
        means = intervals(table)
        run.save("cross_validation.csv", means)
        return summary(means)

    def deal(
        self, run: "Run", pool: View, parts: int, by: str | None
    ) -> Iterator[tuple[Codes, Codes]]:
        """The rows that are not in a part, and those that are, for each of so many parts, in which
        samples with one value of column `by` are together.
        """
        n = len(pool)
        group = np.arange(n) if by is None else self.column(run, pool, by)
        strata = (
            np.zeros(n, int) if self.stratify is None else self.column(run, pool, self.stratify)
        )
        if (groups := len(np.unique(group))) < parts:
            raise UserError(
                f"stage.{run.stage}: {groups} groups ({by or 'samples'}) make no {parts} parts; "
                f"set stage.{run.stage}.folds to fewer"
            )
        dealt = StratifiedGroupKFold(parts, shuffle=True, random_state=run.seed % 2**32)
        with warnings.catch_warnings():
            # Of a class with fewer groups than there are parts some parts have none.
            warnings.simplefilter("ignore", UserWarning)
            try:
                yield from dealt.split(np.zeros(n), strata, group)
            except ValueError:
                raise UserError(
                    f"stage.{run.stage}: every {self.stratify} has fewer than {parts} samples; set "
                    f"stage.{run.stage}.folds and .inner to fewer, or .stratify=null"
                ) from None

    def column(self, run: "Run", pool: View, name: str) -> Codes:
        """Codes (n,) of a column that the config names."""
        if name not in pool:
            raise UserError(
                f"stage.{run.stage}: the data has no column '{name}'; there are "
                f"{', '.join(sorted(pool.columns))}"
            )
        codes: Codes = pool[name].numpy()
        return codes

    def methods(
        self, run: "Run", pool: View, rest: Codes, fold: Codes, name: str
    ) -> dict[str, Arrays]:
        """What the model and each baseline say of a fold, and the columns to compare with."""
        assert self.fit is not None
        held_out = pool.take(torch.from_numpy(fold))
        outer = pool.take(torch.from_numpy(rest))
        train, val = self.within(run, outer)
        views = {"train": outer.take(torch.from_numpy(train))}
        views["val"] = outer.take(torch.from_numpy(val))
        model = run.build_model()
        run.fit(model, self.fit, name, views)
        names = metric_inputs([*self.metrics.values(), *self.voted.values()])
        if names is None:
            raise UserError(f"stage.{run.stage}: a metric does not say which arrays it `reads`")
        names |= {each for each in (self.vote, self.group) if each is not None}
        seen = predict(model, run.prepared(held_out), names, run.machine, oom=run.measured["oom"])
        found = {"model": {key: value.numpy() for key, value in seen.items()}}
        columns, given = arrays_of(outer), arrays_of(held_out)
        # A column that is asked for by `input/` as well is one that methods predict.
        true = {n: given.get(n.removeprefix("input/")) for n in names if f"input/{n}" not in names}
        known = {name: array for name, array in true.items() if array is not None}
        for method, fit in self.baselines.items():
            told = {key: array for key, array in fit(columns, given).items() if key in names}
            found[method] = known | told
        return found

    def within(self, run: "Run", outer: View) -> tuple[Codes, Codes]:
        """The rows that a model is fitted to, and those that steer the fit; by group as long as
        there are two groups.
        """
        groups = len(outer if self.group is None else outer[self.group].unique())
        if groups < 2:
            return next(self.deal(run, outer, self.inner, None))
        return next(self.deal(run, outer, min(self.inner, groups), self.group))

    def scores(self, arrays: Mapping[str, Array]) -> dict[str, float]:
        """The scores of a fold, and as ``voted_<score>`` those of the votes."""
        found = {k: v for metric in self.metrics.values() for k, v in metric(arrays).items()}
        if self.vote is not None:
            means = vote(arrays, self.vote)
            for metric in self.voted.values():
                found |= {f"voted_{key}": value for key, value in metric(means).items()}
        return found

    def metric_names(self) -> set[str] | None:
        """Metrics this stage gives: not known before, for they are those of its metrics."""
        return None


def arrays_of(view: View) -> Arrays:
    """The columns of a view in memory."""
    return {name: column.cpu().numpy() for name, column in view.columns.items()}


def vote(arrays: Mapping[str, Array], column: str) -> Arrays:
    """The mean of what is said of the samples with one value of a column; of codes, the first."""
    first, group = np.unique(arrays[column], return_index=True, return_inverse=True)[1:]
    number = np.bincount(group).astype(float)

    def voted(array: Array) -> Array:
        if array.dtype.kind != "f":
            return array[first]
        total = np.zeros((len(first), *array.shape[1:]))
        np.add.at(total, group, array)
        mean: Array = total / number.reshape(-1, *[1] * (array.ndim - 1))
        return mean

    return {name: voted(array) for name, array in arrays.items()}


def intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95 % interval over the folds of each method and score, in long form."""
    rows = []
    for method, own in table.groupby("method", sort=False):
        for score in own.columns.drop(["method", "fold", "n"]):
            if (known := int(own[score].notna().sum())) > 0:
                mean, low, high = mean_interval(own[score].to_list())
                row = {"mean": mean, "low": low, "high": high, "folds": known}
                rows.append({"method": method, "score": score} | row)
    return pd.DataFrame(rows)


def summary(means: pd.DataFrame) -> dict[str, float]:
    """The means by method and score, and the interval of the model's."""
    found: dict[str, float] = {}
    for row in means.to_dict("records"):
        if row["method"] != "model":
            found[f"{row['method']}_{row['score']}"] = row["mean"]
            continue
        found[row["score"]] = row["mean"]
        found |= {
            f"{row['score']}_{end}": row[end] for end in ("low", "high") if row[end] == row[end]
        }
    return found
