"""The stage that trains and scores a model on each fold of a cross-validation."""

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
    from stagesweep.run.context import Context

Array = NDArray[Any]
Arrays = dict[str, Array]
Codes = NDArray[np.int64]


@dataclass
class CrossValidate(schema.CrossValidate):
    """Train a new model for each fold of the pooled `splits` and score it on that fold.

    All samples of a `group` are in one fold, and `stratify` has about the same distribution in each
    fold (scikit-learn's StratifiedGroupKFold). The rest is split again in the same way into
    training and validation samples, so the epoch is never chosen on the fold that is reported. A
    model that fits preprocessing (``adapt``) sees its training samples only. Preprocessing that
    the data set fitted to its own training split is not repeated. Baselines are fitted to all
    samples outside the fold. If only one group remains outside it, its samples are split.

    Saves ``folds.csv`` (a row for each method and fold), ``cross_validation.csv`` (mean and 95 %
    interval over folds) and ``out_of_fold.npz``: the `fold` and `row` of each sample in the pooled
    data, and ``<method>/<array>`` for each array that the metrics read.
    """

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return ``<score>`` of the model with ``_low`` and ``_high``, and ``<method>_<score>``."""
        if self.fit is None:
            raise UserError(f"stage.{run.stage}.fit is not set; give it the settings of a fit")
        run.select(self.fit.part, self.fit.view)
        first, *others = (run.data.split(split) for split in self.splits)
        pool = first.join(others)
        rows: list[dict[str, Any]] = []
        found: list[Arrays] = []
        for number, (rest, fold) in enumerate(self.split(run, pool, self.folds, self.group), 1):
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

    def split(
        self, run: "Context", pool: View, parts: int, by: str | None
    ) -> Iterator[tuple[Codes, Codes]]:
        """Yield the rows outside and inside each of `parts` parts of the pool.

        Samples with the same value of column `by` are in the same part.
        """
        n = len(pool)
        group = np.arange(n) if by is None else self.column(run, pool, by)
        strata = (
            np.zeros(n, int) if self.stratify is None else self.column(run, pool, self.stratify)
        )
        if (groups := len(np.unique(group))) < parts:
            raise UserError(
                f"stage.{run.stage}: {parts} parts need more groups ({by or 'samples'}) than "
                f"{groups}; set stage.{run.stage}.folds to fewer"
            )
        splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=run.seed % 2**32)
        with warnings.catch_warnings():
            # A class with fewer groups than parts is missing in some parts.
            warnings.simplefilter("ignore", UserWarning)
            try:
                yield from splitter.split(np.zeros(n), strata, group)
            except ValueError:
                raise UserError(
                    f"stage.{run.stage}: every {self.stratify} has fewer than {parts} samples; set "
                    f"stage.{run.stage}.folds and .inner to fewer, or .stratify=null"
                ) from None

    def column(self, run: "Context", pool: View, name: str) -> Codes:
        """Codes (n,) of a column; UserError when the data has no such column."""
        if name not in pool:
            raise UserError(
                f"stage.{run.stage}: the data has no column '{name}'; there are "
                f"{', '.join(sorted(pool.columns))}"
            )
        codes: Codes = pool[name].numpy()
        return codes

    def methods(
        self, run: "Context", pool: View, rest: Codes, fold: Codes, name: str
    ) -> dict[str, Arrays]:
        """Predictions of the model and of each baseline for a fold, with the true columns."""
        assert self.fit is not None
        held_out = pool.take(torch.from_numpy(fold))
        outer = pool.take(torch.from_numpy(rest))
        train, val = self.inner_split(run, outer)
        views = {"train": outer.take(torch.from_numpy(train))}
        views["val"] = outer.take(torch.from_numpy(val))
        model = run.build_model()
        run.fit(model, self.fit, name, views)
        names = metric_inputs([*self.metrics.values(), *self.voted.values()])
        if names is None:
            raise UserError(f"stage.{run.stage}: a metric does not say which arrays it `reads`")
        names |= {each for each in (self.vote, self.group) if each is not None}
        predicted = predict(
            model, run.prepared(held_out), names, run.profile, oom=run.measured["oom"]
        )
        found = {"model": {key: value.numpy() for key, value in predicted.items()}}
        columns, given = arrays_of(outer), arrays_of(held_out)
        # Methods predict the columns that are also read as `input/<name>`.
        true = {n: given.get(n.removeprefix("input/")) for n in names if f"input/{n}" not in names}
        known = {name: array for name, array in true.items() if array is not None}
        for method, fit in self.baselines.items():
            own = {key: array for key, array in fit(columns, given).items() if key in names}
            found[method] = known | own
        return found

    def inner_split(self, run: "Context", outer: View) -> tuple[Codes, Codes]:
        """Training and validation rows of a model, split by group if there are two or more."""
        groups = len(outer if self.group is None else outer[self.group].unique())
        if groups < 2:
            return next(self.split(run, outer, self.inner, None))
        return next(self.split(run, outer, min(self.inner, groups), self.group))

    def scores(self, arrays: Mapping[str, Array]) -> dict[str, float]:
        """Scores of a fold, and ``voted_<score>`` of the predictions averaged by `vote`."""
        found = {k: v for metric in self.metrics.values() for k, v in metric(arrays).items()}
        if self.vote is not None:
            means = vote(arrays, self.vote)
            for metric in self.voted.values():
                found |= {f"voted_{key}": value for key, value in metric(means).items()}
        return found

    def metric_names(self) -> set[str] | None:
        """None: the names depend on `metrics`."""
        return None


def arrays_of(view: View) -> Arrays:
    """Columns of a view, as arrays."""
    return {name: column.cpu().numpy() for name, column in view.columns.items()}


def vote(arrays: Mapping[str, Array], column: str) -> Arrays:
    """Average the arrays over samples with the same value of a column; codes: take the first."""
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
    """Means by method and score, with the interval for the model."""
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
