"""Mouse audiograms (auditory brainstem response thresholds) from a CSV file with a column map.

A hearing threshold is the sound level in dB SPL, from 0 to 100, at which the brainstem first
responds. It is measured at several frequencies and for a click. Thresholds differ more between the
equipment of laboratories than between most genes.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import View
from stagesweep.data.duplicates import check_duplicates, unique_names
from stagesweep.data.split import connected_groups, split_groups
from stagesweep.data.table import numeric_columns, read_table, require_columns

LOWEST, HIGHEST = 0.0, 100.0
# A threshold beyond these, in dB SPL, was not measured: no equipment is that soft or that loud.
POSSIBLE = (-20.0, 140.0)
IDS = ("unique", "merge")  # values of `duplicates` that accept repeated ids
SPLITS = ("train", "val", "test")
Values = NDArray[np.float64]
Codes = NDArray[np.int64]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Column map: names of this package -> columns of the file.

    A null column counts as absent. `thresholds` are in dB SPL, in order of frequency; `metadata`
    are numbers; `categories` are inputs of the model; `labels` are not inputs, but are used to
    pair, split and score. The values of all `equipment` columns together form the label
    `equipment`.
    """

    thresholds: Mapping[str, str | None]
    metadata: Mapping[str, str | None] = field(default_factory=dict)
    categories: Mapping[str, str | None] = field(default_factory=dict)
    labels: Mapping[str, str | None] = field(default_factory=dict)
    equipment: Sequence[str] = ()
    id: str | None = None
    # Name -> lowest and highest possible value; null: no bound. `thresholds` stands for all.
    ranges: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Drop null columns; raises UserError for a name used twice or for no thresholds."""
        known = ("thresholds", *self.thresholds, *self.metadata)  # a range of a null column is none
        for each in fields(self):
            mapping = getattr(self, each.name)
            if isinstance(mapping, Mapping):
                object.__setattr__(self, each.name, {k: v for k, v in mapping.items() if v})
        taken = ["thresholds", "metadata", "pca", "index"] + ["equipment"] * bool(self.equipment)
        for name in (*self.categories, *self.labels):
            if name in taken:
                raise UserError(f"data.columns uses the name {name!r} twice; rename one of them")
            taken.append(name)
        if not self.thresholds:
            raise UserError("data.columns.thresholds is empty; name at least one frequency")
        for name, limits in self.ranges.items():
            if name not in known:
                raise UserError(
                    f"data.columns.ranges.{name} is the range of no column; there are "
                    f"{', '.join(known)}"
                )
            if len(limits) != 2:
                raise UserError(f"data.columns.ranges.{name} must be [lowest, highest]")

    def range_of(self, name: str) -> tuple[float, float]:
        """Return the lowest and highest possible value of a threshold or of metadata."""
        group = "thresholds" if name in self.thresholds else name
        default = POSSIBLE if name in self.thresholds else (None, None)
        low, high = self.ranges.get(name, self.ranges.get(group, default))
        return -np.inf if low is None else low, np.inf if high is None else high

    def used(self) -> list[str]:
        """Return the columns that the file must have."""
        maps = (self.thresholds, self.metadata, self.categories, self.labels)
        named = [column for mapping in maps for column in mapping.values() if column]
        return [*named, *self.equipment, *([self.id] if self.id else [])]


class Audiogram:
    """Audiograms of many animals, split and standardised.

    Columns of a split of n animals: `thresholds` (n, w) as z-scores with `thresholds/mask`,
    `thresholds/shift` and `thresholds/scale` (dB = z * scale + shift); `metadata` (n, m) as
    z-scores with `metadata/mask`; `pca` (n, p), whitened principal components of the thresholds;
    one column for each category (0 = unknown) and each label (-1 = none).

    Scalers, components and categories are fitted to the training split only. A missing value is 0
    with mask False; nothing is imputed.
    """

    spec: Spec
    # Label -> names of its codes, over all splits.
    label_names: dict[str, list[str]]

    def __init__(
        self,
        path: str | pd.DataFrame,
        columns: Columns,
        standardise: Literal["equipment", "global"] = "equipment",
        min_group: int = 20,
        pca: int = 2,
        fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
        split_by: Sequence[str] = ("gene", "litter"),
        split_seed: int = 0,
        clip: bool = False,
        tile: int = 1,
        separator: str = "auto",
        decimal: str = "auto",
        out_of_range: str = "refuse",
        duplicates: str = "refuse",
    ) -> None:
        """Read the animals of a CSV file, or of a table in memory, one per row.

        `standardise` computes z-scores over the training animals of the same equipment, or over
        all (global). Equipment with fewer than `min_group` training animals uses all. `pca` is the
        number of components to add. `fractions` are those of train, val and test; animals that
        share a value of a `split_by` label are in the same split (labels that are not mapped are
        ignored). Thresholds outside 0 to 100 dB are an error, or clipped with `clip`. `tile`
        repeats every row of every split, to measure speed on a larger cohort. `separator` and
        `decimal` are those of the file: comma, semicolon or tab; point or comma; auto recognises
        them. A value outside the range of its column is an error, or missing with `out_of_range`
        missing. An id that occurs twice is an error; with `duplicates` unique, its rows get names
        of their own and stay in one split; merge averages them. Raises UserError naming
        what is wrong.
        """
        if tile < 1:
            raise UserError(f"data.tile={tile} must be at least 1")
        source = path if isinstance(path, str) else "the table"
        table = read_table(path, separator) if isinstance(path, str) else path
        require_columns(table, columns.used(), source)
        thresholds = _in_range(table, columns, columns.thresholds, source, decimal, out_of_range)
        decibels = _decibels(thresholds, columns.thresholds, source, clip)
        metadata = _in_range(table, columns, columns.metadata, source, decimal, out_of_range)
        if columns.id is not None and duplicates == "merge":
            table, decibels, metadata = _merged(table, columns, decibels, metadata, source)
        heard = ~np.isnan(decibels).all(axis=1)
        if not heard.all():
            log.warning("%s: left out %d animals without any threshold", source, (~heard).sum())
            table, decibels, metadata = table[heard], decibels[heard], metadata[heard]
        self.label_names, labels = _labels(table, columns)
        tied = [labels[name] for name in split_by if name in labels]
        if columns.id is not None:
            ids = table[columns.id].astype("string")
            check_duplicates(ids, duplicates, f"{columns.id!r} of {source}", "data.duplicates", IDS)
            if ids.dropna().duplicated().any():
                tied.append(pd.factorize(ids)[0].astype(np.int64))
        ties = connected_groups(tied, len(table))
        rows = split_groups(ties, dict(zip(SPLITS, fractions, strict=True)), split_seed)
        groups, train = _scaling_groups(standardise, labels, len(table)), rows["train"]

        self._columns = {name: torch.from_numpy(codes) for name, codes in labels.items()}
        features = {"thresholds": _threshold_features(tuple(columns.thresholds))}
        for name, column in _scaled(decibels, groups, train, min_group, columns.thresholds).items():
            self._columns["thresholds" + name] = column
        if pca:
            self._columns["pca"] = _components(self._columns["thresholds"], train, pca)
            features["pca"] = Features(tuple(f"pc{number + 1}" for number in range(pca)))
        if columns.metadata:
            scaled = _scaled(metadata, np.zeros_like(groups), train, 1, columns.metadata)
            self._columns |= {"metadata": scaled[""], "metadata/mask": scaled["/mask"]}
            features["metadata"] = Features(tuple(columns.metadata), unit="z-score")
        sizes = {}
        for name, theirs in columns.categories.items():
            self._columns[name], sizes[name] = _category(table[theirs], train)

        counts = {name: len(names) for name, names in self.label_names.items()}
        self.spec = Spec(features, sizes, counts)
        self._rows = {name: np.tile(members, tile) for name, members in rows.items()}
        self._names = _names(table, columns.id)

    def split(self, name: str) -> View:
        """Return the named split; raises UserError naming the splits that exist."""
        rows = torch.from_numpy(self._members(name))
        return View({key: column[rows] for key, column in self._columns.items()})

    def ids(self, split: str) -> NDArray[np.str_]:
        """Return the names (n,) of the animals of a split: their id, or else their row number."""
        return self._names[self._members(split)]

    def _members(self, split: str) -> Codes:
        if split not in self._rows:
            raise UserError(f"no split {split!r}; there are {', '.join(self._rows)}")
        return self._rows[split]


def _threshold_features(names: tuple[str, ...]) -> Features:
    """Return the features of thresholds: drawn with soft sounds on top, a click on its own."""
    tones = [name for name in names if name.lower().endswith("hz")]
    others = tuple(name for name in names if name not in tones) if tones else ()
    return Features(
        names, LOWEST, HIGHEST, ordered=True, unit="dB SPL", isolated=others, inverted=True
    )


def _in_range(
    table: pd.DataFrame,
    columns: Columns,
    mapping: Mapping[str, str | None],
    source: str,
    decimal: str,
    out_of_range: str,
) -> Values:
    """Return numbers (n, w), NaN where missing; values outside their range are refused or NaN."""
    if out_of_range not in ("refuse", "missing"):
        raise UserError(f"data.out_of_range={out_of_range!r} must be refuse or missing")
    values = numeric_columns(table, [name for name in mapping.values() if name], source, decimal)
    limits = np.array([columns.range_of(name) for name in mapping]).reshape(-1, 2)
    outside = (values < limits[:, 0]) | (values > limits[:, 1])
    if out_of_range == "missing" and outside.any():
        log.warning("%s: %d values out of range are missing", source, outside.sum())
        return np.where(outside, np.nan, values)
    for row, number in np.argwhere(outside)[:1]:
        name = list(mapping)[number]
        low, high = limits[number]
        key = "thresholds" if name in columns.thresholds and name not in columns.ranges else name
        raise UserError(
            f"{values[row, number]:g} is not a possible value ({low:g} to {high:g}): column "
            f"{mapping[name]!r}, line {row + 2} of {source}; fix it, set "
            f"data.out_of_range=missing, or set data.columns.ranges.{key}"
        )
    return values


def _decibels(
    decibels: Values, columns: Mapping[str, str | None], source: str, clip: bool
) -> Values:
    """Return the thresholds in dB SPL, (n, w), all within what equipment plays."""
    names = list(columns.values())
    if np.isnan(decibels).all():
        raise UserError(f"{source} holds no thresholds")
    if clip:
        return decibels.clip(LOWEST, HIGHEST)
    for row, column in np.argwhere((decibels < LOWEST) | (decibels > HIGHEST))[:1]:
        raise UserError(
            f"{decibels[row, column]:g} dB is outside {LOWEST:g} to {HIGHEST:g}: column "
            f"{names[column]!r}, line {row + 2} of {source}; fix it, or set data.clip=true"
        )
    return decibels


def _names(table: pd.DataFrame, column: str | None) -> NDArray[np.str_]:
    """Return the names (n,) of the animals: their id, or else their row number."""
    numbered = pd.Series([str(number) for number in range(len(table))], table.index)
    named = numbered if column is None else table[column].fillna(numbered)
    names: NDArray[np.str_] = np.array(unique_names(named.to_numpy(str).tolist()))
    return names


def _merged(
    table: pd.DataFrame, columns: Columns, decibels: Values, metadata: Values, source: str
) -> tuple[pd.DataFrame, Values, Values]:
    """Average the numbers of the rows of each id; raises UserError where other columns differ.

    Rows without an id are kept. An animal has the place of its first row.
    """
    ids = table[str(columns.id)].astype("string")
    group = ids.where(ids.notna(), pd.Series(np.arange(len(ids)), ids.index).astype("string") + "#")
    codes = pd.factorize(group)[0]
    texts = [*columns.categories.values(), *columns.labels.values(), *columns.equipment]
    for column in dict.fromkeys(name for name in texts if name):
        differs = table[column].groupby(codes).nunique() > 1
        for code in np.flatnonzero(differs)[:1]:
            raise UserError(
                f"{ids.iloc[np.flatnonzero(codes == code)[0]]!r} has several values of {column!r} "
                f"in {source}, so its rows cannot be merged; fix it, or set data.duplicates=unique"
            )
    means = [pd.DataFrame(values).groupby(codes).mean() for values in (decibels, metadata)]
    rows = table.groupby(codes).first()
    rows.attrs = table.attrs
    return rows, means[0].to_numpy(np.float64), means[1].to_numpy(np.float64).reshape(len(rows), -1)


def _labels(table: pd.DataFrame, columns: Columns) -> tuple[dict[str, list[str]], dict[str, Codes]]:
    """Return the sorted names of each label, and its codes (n,) with -1 for none."""
    texts = {name: table[column] for name, column in columns.labels.items()}
    if columns.equipment:
        parts = [table[column].astype(str) for column in columns.equipment]
        texts["equipment"] = parts[0].str.cat(parts[1:], sep=" / ")
    names, codes = {}, {}
    for label, text in texts.items():
        found = text.astype("string").astype("category").cat
        names[label] = found.categories.tolist()
        codes[label] = found.codes.to_numpy(np.int64, copy=True)
    return names, codes


def _scaling_groups(standardise: str, labels: Mapping[str, Codes], rows: int) -> Codes:
    """Return the group (n,) in which each animal is standardised."""
    if standardise == "global":
        return np.zeros(rows, dtype=np.int64)
    if standardise != "equipment":
        raise UserError(f"data.standardise is equipment or global, not {standardise!r}")
    if "equipment" not in labels:
        raise UserError("data.standardise=equipment needs data.columns.equipment; or use global")
    return labels["equipment"]


def _scaled(
    values: Values, groups: Codes, train: Codes, min_group: int, names: Collection[str]
) -> dict[str, Tensor]:
    """Return z-scores within each group, their /mask, /shift and /scale, (n, w) each.

    A feature with fewer than `min_group` training values in a group, or with zero variance there,
    is standardised over all training animals.
    """
    training = pd.DataFrame(values[train], columns=list(names))
    mean, spread = training.mean(), training.std(ddof=0)
    for name in mean.index[mean.isna()]:
        raise UserError(f"{name!r} has no value in the training split; set it null in data.columns")
    grouped = training.groupby(groups[train])
    own_spread = grouped.std(ddof=0)
    usable = (grouped.count() >= min_group) & (own_spread > 0)
    shift = grouped.mean().where(usable).reindex(groups).fillna(mean).to_numpy(copy=True)
    spread = spread.where(spread > 0, 1)
    scale = own_spread.where(usable).reindex(groups).fillna(spread).to_numpy(copy=True)
    known = ~np.isnan(values)
    scores = np.where(known, (values - shift) / scale, 0.0)
    return {
        "": torch.from_numpy(scores).float(),
        "/mask": torch.from_numpy(known),
        "/shift": torch.from_numpy(shift).float(),
        "/scale": torch.from_numpy(scale).float(),
    }


def _components(scores: Tensor, train: Codes, number: int) -> Tensor:
    """Return whitened principal components (n, number) of z-scores; missing values are 0."""
    if number > min(len(train), scores.shape[1]):
        raise UserError(
            f"data.pca={number} is more than the {scores.shape[1]} thresholds there are"
        )
    fitted = PCA(number, whiten=True, svd_solver="covariance_eigh").fit(scores[train].numpy())
    return torch.from_numpy(fitted.transform(scores.numpy())).float()


def _category(text: pd.Series, train: Codes) -> tuple[Tensor, int]:
    """Return codes (n,) of the values in the training split, 0 for any other, and their number."""
    values = sorted(text.iloc[train].dropna().unique())
    codes = pd.Index(values).get_indexer(text) + 1
    return torch.from_numpy(codes.astype(np.int64)), len(values) + 1
