"""Gene counts of single cells, from an `.h5ad` file or a table in memory."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import View
from stagesweep.data.duplicates import check_duplicates, unique_names
from stagesweep.data.split import split_groups, split_strata
from stagesweep.systems.singlecell.data import h5ad
from stagesweep.systems.singlecell.data.cells import BackedCellView, CellDataset, CellView
from stagesweep.systems.singlecell.data.genes import (
    cell_qc_metrics,
    cells_per_gene,
    pearson_residual_variance,
)
from stagesweep.systems.singlecell.data.h5ad import (
    BackedFile,
    CountSource,
    CountTable,
    IntArray,
    read_h5ad,
)

SPLITS = ("train", "val", "test")
# With fewer donors of a condition than this, splits are by cell.
MIN_DONORS = 8
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Column map of the cells' table (`obs`); a null column is ignored.

    `label` is the cell type, `donor` the patient or animal, `condition` the group of a donor
    (disease, treatment), `batch` the laboratory or run.
    """

    label: str
    donor: str | None = None
    condition: str | None = None
    batch: str | None = None

    def mapped(self) -> dict[str, str]:
        """The columns that are not null: our name -> name in the file."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: column for name, column in named.items() if column}


class SingleCell:
    """Data set of single cells, filtered and split.

    Columns of a batch: `counts` (B, g) of the selected genes, `library` (B, 1), their sum, and the
    codes of `label`, `donor`, `condition` and `batch` (-1 = none). Genes are selected on the
    training split only. Counts in memory stay sparse; with `backed` they are read from the file
    batch by batch.
    """

    spec: Spec
    # Label -> the names of its codes, over all splits.
    label_names: dict[str, list[str]]

    def __init__(
        self,
        path: str | CountTable,
        columns: Columns,
        layer: str | None = None,
        drop: Sequence[str] = (),
        paired: bool = False,
        min_cells: int = 3,
        min_genes: int = 1,
        variable: int | None = None,
        fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
        split_by: str = "auto",
        split_seed: int = 0,
        backed: bool = False,
        duplicate_cells: str = "refuse",
        duplicate_genes: str = "refuse",
    ) -> None:
        """Prepare a file, or a table in memory.

        `layer` holds the counts (null: X; raw: raw.X). Filters, in this order: cells of the types
        in `drop` and with fewer than `min_genes` genes, genes detected in fewer than `min_cells`
        training cells, all but the `variable` most variable genes. `split_by` donor puts all cells
        of a donor into one split; cell stratifies by type; auto is donor if each condition has at
        least eight donors. `paired` allows a donor in several conditions. Names that occur twice
        are an error; with `duplicate_cells` or `duplicate_genes` unique they get a number, and
        `duplicate_genes` merge sums the counts of genes of one name. Raises UserError for
        invalid data.
        """
        source: CountSource
        if isinstance(path, CountTable):
            source = path
        else:
            source = BackedFile(path, layer) if backed else read_h5ad(path, layer)
        require_columns(source.obs, columns.mapped(), source.name)
        source = h5ad.resolve_genes(source, duplicate_genes)
        detected, self.totals = cell_qc_metrics(source)  # totals are over all genes
        labels = source.obs[columns.label].astype("string")
        kept = np.flatnonzero((detected >= min_genes) & ~labels.isin(list(drop)).to_numpy(bool))
        if not len(kept):
            raise UserError(
                f"{source.name}: no cell has data.min_genes={min_genes} genes; lower it"
            )
        self.obs = source.obs.iloc[kept]
        names = pd.Series(self.obs.index.to_numpy(str))
        where = f"the cells of {source.name}"
        check_duplicates(names, duplicate_cells, where, "data.duplicate_cells", ("unique",))
        self.label_names, codes = encode_labels(self.obs, columns)
        check_labels(self.label_names, codes, paired, source.name)
        rows = split_cells(codes, dict(zip(SPLITS, fractions, strict=True)), split_by, split_seed)
        if names.duplicated().any():
            rows = keep_together(names, rows, codes)
            self.obs = self.obs.set_axis(unique_names(names.tolist()))
        log.info("%s: %d cells", source.name, len(kept))
        self._rows, self._kept, self._source = rows, kept, source
        self._columns = {name: torch.from_numpy(code) for name, code in codes.items()}
        self.genes = self._select_genes(kept[rows["train"]], min_cells, variable, split_seed)
        genes = tuple(source.genes[gene] for gene in self.genes)
        self.spec = Spec(
            {"counts": Features(genes, low=0.0, unit="count")},
            labels={name: len(known) for name, known in self.label_names.items()},
        )
        self._counts = source.counts[:, self.genes] if isinstance(source, CountTable) else None

    def _select_genes(
        self, train: IntArray, min_cells: int, variable: int | None, seed: int
    ) -> IntArray:
        """Return the selected genes in file order, and describe all genes in `gene_table`."""
        source = self._source
        detected = cells_per_gene(source, train)
        genes = np.flatnonzero(detected >= max(min_cells, 1))
        if not len(genes):
            raise UserError(
                f"{source.name}: no gene is in data.min_cells={min_cells} cells; lower it"
            )
        table = pd.DataFrame({"gene": source.genes, "cells": detected, "variance": np.nan})
        if variable is not None and variable < len(genes):
            variance = pearson_residual_variance(source, train, genes, seed)
            table.loc[genes, "variance"] = variance
            genes = np.sort(genes[np.argsort(-variance, kind="stable")[:variable]])
        self.gene_table = table.assign(kept=np.isin(np.arange(len(table)), genes))
        return genes

    def split(self, name: str) -> View:
        """Return the cells of a split; raises UserError for an unknown split."""
        rows = self._split_rows(name)
        columns = {key: column[torch.from_numpy(rows)] for key, column in self._columns.items()}
        if self._counts is not None:
            return CellView(self._counts[self._kept[rows]], columns)
        return BackedCellView(CellDataset(self._source, self._kept[rows], self.genes), columns)

    def ids(self, split: str) -> NDArray[np.str_]:
        """The names of the cells of a split, (n,)."""
        names: NDArray[np.str_] = self.obs.index.to_numpy(str)[self._split_rows(split)]
        return names

    def cell_table(self, split: str) -> pd.DataFrame:
        """Return a table of the cells of a split: id, split, names of labels and total counts."""
        rows = self._split_rows(split)
        columns = {name: column.numpy()[rows] for name, column in self._columns.items()}
        # A code of -1 selects the last name, None.
        names = {n: np.array([*self.label_names[n], None], dtype=object) for n in columns}
        labels = {name: names[name][codes] for name, codes in columns.items()}
        total = self.totals[self._kept[rows]]
        return pd.DataFrame({"id": self.ids(split), "split": split, **labels, "total": total})

    def _split_rows(self, split: str) -> IntArray:
        if split not in self._rows:
            raise UserError(f"no split {split!r}; there are {', '.join(self._rows)}")
        return self._rows[split]


def pbmc68k(
    min_cells: int = 3,
    min_genes: int = 1,
    variable: int | None = None,
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
    split_seed: int = 0,
) -> SingleCell:
    """The 700 blood cells of scanpy's `pbmc68k_reduced`: one donor, ten types."""
    return SingleCell(
        h5ad.pbmc68k(),
        Columns("bulk_labels"),
        min_cells=min_cells,
        min_genes=min_genes,
        variable=variable,
        fractions=fractions,
        split_by="cell",
        split_seed=split_seed,
    )


def require_columns(obs: pd.DataFrame, mapped: Mapping[str, str], source: str) -> None:
    """Raise UserError if a mapped column is missing, naming the nearest ones."""
    for name, column in mapped.items():
        if column not in obs:
            near = get_close_matches(column, [str(each) for each in obs], n=3, cutoff=0)
            hint = f"; the nearest are {', '.join(near)}" if near else ", which has none"
            raise UserError(f"no obs column {column!r} in {source}{hint} (data.columns.{name})")


def encode_labels(
    obs: pd.DataFrame, columns: Columns
) -> tuple[dict[str, list[str]], dict[str, IntArray]]:
    """Return the sorted names of each label, and its codes (n,) with -1 for missing values."""
    names, codes = {}, {}
    for label, column in columns.mapped().items():
        found = obs[column].astype("string").astype("category").cat
        names[label] = [str(each) for each in found.categories]
        codes[label] = found.codes.to_numpy(np.int64, copy=True)
    return names, codes


def check_labels(
    names: Mapping[str, Sequence[str]], codes: Mapping[str, IntArray], paired: bool, source: str
) -> None:
    """Raise UserError for types with one cell, missing donors, and donors in two conditions."""
    for kind in np.flatnonzero(np.bincount(codes["label"][codes["label"] >= 0]) == 1)[:1]:
        name = names["label"][kind]
        raise UserError(
            f"{source} has one cell of type {name!r}, too few for training and test; leave it out: "
            f"'data.drop=[\"{name}\"]'"
        )
    if "donor" not in codes:
        return
    if (missing := int((codes["donor"] < 0).sum())) > 0:
        raise UserError(
            f"{source}: {missing} cells have no donor; fix the file or data.columns.donor"
        )
    if "condition" in codes and not paired:
        pairs = np.unique(np.stack([codes["donor"], codes["condition"]]), axis=1)
        for donor in np.flatnonzero(np.bincount(pairs[0]) > 1)[:1]:
            which = [names["condition"][c] for c in pairs[1][pairs[0] == donor]]
            raise UserError(
                f"{source}: donor {names['donor'][donor]!r} is in {len(which)} conditions "
                f"({', '.join(which)}); correct it, or set data.paired=true if each donor was "
                "measured under several"
            )


def keep_together(
    names: pd.Series, rows: Mapping[str, IntArray], codes: Mapping[str, IntArray]
) -> dict[str, IntArray]:
    """Return splits in which cells of one name are in the first split that any of them is in.

    Where whole donors are held out, a name that two donors share is that of two cells.
    """
    side = np.empty(len(names), np.int64)
    for number, members in enumerate(rows.values()):
        side[members] = number
    donors = codes.get("donor")
    if donors is not None and (pd.Series(side).groupby(donors).nunique() == 1).all():
        return dict(rows)
    side = pd.Series(side).groupby(names.to_numpy()).transform("min").to_numpy()
    together = {name: np.flatnonzero(side == number) for number, name in enumerate(rows)}
    for name, members in together.items():
        if not len(members):
            raise UserError(f"the {name} split is empty: its cells occur in other splits as well")
    return together


def split_cells(
    codes: Mapping[str, IntArray], fractions: Mapping[str, float], by: str, seed: int
) -> dict[str, IntArray]:
    """Return the rows of each split: whole donors by condition, or cells by type."""
    if by not in ("auto", "donor", "cell"):
        raise UserError(f"data.split_by={by} must be auto, donor or cell")
    if by == "donor" and "donor" not in codes:
        raise UserError("data.split_by=donor needs data.columns.donor")
    if by == "cell" or "donor" not in codes:
        return split_strata(codes["label"], fractions, seed)
    donors, first = np.unique(codes["donor"], return_index=True)
    conditions = codes.get("condition", np.zeros_like(codes["donor"]))
    unpaired = len(np.unique(np.stack([codes["donor"], conditions]), axis=1).T) == len(donors)
    condition = conditions[first] if unpaired else np.zeros_like(first)
    if by == "auto" and min(np.bincount(condition)[np.unique(condition)]) < MIN_DONORS:
        log.info("%d donors are too few to hold out donors: splitting by cell", len(donors))
        return split_strata(codes["label"], fractions, seed)
    row_condition = condition[np.searchsorted(donors, codes["donor"])]
    found: dict[str, list[IntArray]] = {name: [] for name in fractions}
    for value in np.unique(row_condition):
        rows = np.flatnonzero(row_condition == value)
        groups = np.unique(codes["donor"][rows], return_inverse=True)[1]
        for name, members in split_groups(groups, fractions, seed).items():
            found[name].append(rows[members])
    return {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}
