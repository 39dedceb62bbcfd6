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
from stagesweep.data.split import split_groups, split_strata
from stagesweep.systems.singlecell.data import h5ad
from stagesweep.systems.singlecell.data.cells import BackedCellView, CellView, Rows
from stagesweep.systems.singlecell.data.genes import cells_with, residual_variance, survey
from stagesweep.systems.singlecell.data.h5ad import Codes, File, Source, Table, read_table

SPLITS = ("train", "val", "test")
# Fewer donors of a condition than this cannot be dealt into three splits.
DONORS = 8
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """Which column of the cells' table (`obs`) is what; a null column is as good as absent.

    `label` is the cell type; `donor` the patient or animal; `condition` what tells donors apart;
    `batch` the laboratory, the run.
    """

    label: str
    donor: str | None = None
    condition: str | None = None
    batch: str | None = None

    def used(self) -> dict[str, str]:
        """Our name of each column -> its name in the file."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: column for name, column in named.items() if column}


class SingleCell:
    """Cells, filtered, split and ready for a model.

    Columns of a batch: `counts` (B, g) of the genes that are kept, `library` (B, 1), their sum,
    and the codes of `label`, `donor`, `condition` and `batch` (-1 = none). Genes are chosen by the
    training split alone. In memory counts stay sparse; `backed` reads them from the file batch by
    batch.
    """

    spec: Spec
    # Label -> the names its codes stand for, over all splits.
    label_names: dict[str, list[str]]

    def __init__(
        self,
        path: str | Table,
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
    ) -> None:
        """Prepare a file, or a table in memory.

        `layer` holds the counts (null: X; raw: raw.X). Cells of the types in `drop` and with fewer
        than `min_genes` genes are left out, then genes found in fewer than `min_cells` training
        cells, then all but the `variable` most variable ones. `split_by` donor puts a donor's cells
        into one split, cell shares out those of each type; auto takes donor where there are at
        least eight of each condition. `paired` allows a donor in several conditions. Raises
        UserError naming what is wrong.
        """
        source: Source
        if isinstance(path, Table):
            source = path
        else:
            source = File(path, layer) if backed else read_table(path, layer)
        require(source.obs, columns.used(), source.name)
        found, self.totals = survey(source)  # totals are of all genes
        labels = source.obs[columns.label].astype("string")
        kept = np.flatnonzero((found >= min_genes) & ~labels.isin(list(drop)).to_numpy(bool))
        if not len(kept):
            raise UserError(
                f"{source.name}: no cell has data.min_genes={min_genes} genes; lower it"
            )
        self.obs = source.obs.iloc[kept]
        self.label_names, codes = coded(self.obs, columns)
        check_groups(self.label_names, codes, paired, source.name)
        rows = deal(codes, dict(zip(SPLITS, fractions, strict=True)), split_by, split_seed)
        log.info("%s: %d cells", source.name, len(kept))
        self._rows, self._kept, self._source = rows, kept, source
        self._columns = {name: torch.from_numpy(code) for name, code in codes.items()}
        self.genes = self._choose(kept[rows["train"]], min_cells, variable, split_seed)
        names = tuple(source.genes[gene] for gene in self.genes)
        self.spec = Spec(
            {"counts": Features(names, low=0.0, unit="count")},
            labels={name: len(known) for name, known in self.label_names.items()},
        )
        self._counts = source.counts[:, self.genes] if isinstance(source, Table) else None

    def _choose(self, train: Codes, min_cells: int, variable: int | None, seed: int) -> Codes:
        """The genes that are kept, in the order of the file; what is known of each in a table."""
        source = self._source
        found = cells_with(source, train)
        genes = np.flatnonzero(found >= max(min_cells, 1))
        if not len(genes):
            raise UserError(
                f"{source.name}: no gene is in data.min_cells={min_cells} cells; lower it"
            )
        table = pd.DataFrame({"gene": source.genes, "cells": found, "variance": np.nan})
        if variable is not None and variable < len(genes):
            variance = residual_variance(source, train, genes, seed)
            table.loc[genes, "variance"] = variance
            genes = np.sort(genes[np.argsort(-variance, kind="stable")[:variable]])
        self.gene_table = table.assign(kept=np.isin(np.arange(len(table)), genes))
        return genes

    def split(self, name: str) -> View:
        """The cells of a split; raises UserError naming the splits there are."""
        rows = self._members(name)
        columns = {key: column[torch.from_numpy(rows)] for key, column in self._columns.items()}
        if self._counts is not None:
            return CellView(self._counts[self._kept[rows]], columns)
        return BackedCellView(Rows(self._source, self._kept[rows], self.genes), columns)

    def ids(self, split: str) -> NDArray[np.str_]:
        """What each cell of a split is called, (n,)."""
        names: NDArray[np.str_] = self.obs.index.to_numpy(str)[self._members(split)]
        return names

    def cell_table(self, split: str) -> pd.DataFrame:
        """What is known of each cell of a split: id, split, labels by name and total counts."""
        rows = self._members(split)
        columns = {name: column.numpy()[rows] for name, column in self._columns.items()}
        # The last name is what a code of -1 finds.
        names = {n: np.array([*self.label_names[n], None], dtype=object) for n in columns}
        labels = {name: names[name][codes] for name, codes in columns.items()}
        total = self.totals[self._kept[rows]]
        return pd.DataFrame({"id": self.ids(split), "split": split, **labels, "total": total})

    def _members(self, split: str) -> Codes:
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


def require(obs: pd.DataFrame, used: Mapping[str, str], source: str) -> None:
    """Raise UserError unless every column is there, naming the nearest one that is."""
    for name, column in used.items():
        if column not in obs:
            near = get_close_matches(column, [str(each) for each in obs], n=3, cutoff=0)
            hint = f"; the nearest are {', '.join(near)}" if near else ", which has none"
            raise UserError(f"no obs column {column!r} in {source}{hint} (data.columns.{name})")


def coded(obs: pd.DataFrame, columns: Columns) -> tuple[dict[str, list[str]], dict[str, Codes]]:
    """The sorted names of each label, and its codes (n,) with -1 for none."""
    names, codes = {}, {}
    for label, column in columns.used().items():
        found = obs[column].astype("string").astype("category").cat
        names[label] = [str(each) for each in found.categories]
        codes[label] = found.codes.to_numpy(np.int64, copy=True)
    return names, codes


def check_groups(
    names: Mapping[str, Sequence[str]], codes: Mapping[str, Codes], paired: bool, source: str
) -> None:
    """Raise UserError for a type with one cell, a cell without donor, a donor in two conditions."""
    for kind in np.flatnonzero(np.bincount(codes["label"][codes["label"] >= 0]) == 1)[:1]:
        name = names["label"][kind]
        raise UserError(
            f"{source} has one cell of type {name!r}, which cannot be both learnt and tested; "
            f"leave it out: 'data.drop=[\"{name}\"]'"
        )
    if "donor" not in codes:
        return
    if (missing := int((codes["donor"] < 0).sum())) > 0:
        raise UserError(f"{source}: {missing} cells have no donor; mend it or data.columns.donor")
    if "condition" in codes and not paired:
        pairs = np.unique(np.stack([codes["donor"], codes["condition"]]), axis=1)
        for donor in np.flatnonzero(np.bincount(pairs[0]) > 1)[:1]:
            which = [names["condition"][c] for c in pairs[1][pairs[0] == donor]]
            raise UserError(
                f"{source}: donor {names['donor'][donor]!r} is in {len(which)} conditions "
                f"({', '.join(which)}); correct it, or set data.paired=true if each donor was "
                "measured under several"
            )


def deal(
    codes: Mapping[str, Codes], fractions: Mapping[str, float], by: str, seed: int
) -> dict[str, Codes]:
    """The rows of each split: whole donors, within each condition; or cells, within each type."""
    if by not in ("auto", "donor", "cell"):
        raise UserError(f"data.split_by={by} must be auto, donor or cell")
    if by == "donor" and "donor" not in codes:
        raise UserError("data.split_by=donor needs data.columns.donor")
    if by == "cell" or "donor" not in codes:
        return split_strata(codes["label"], fractions, seed)
    donors, first = np.unique(codes["donor"], return_index=True)
    of_cell = codes.get("condition", np.zeros_like(codes["donor"]))
    alone = len(np.unique(np.stack([codes["donor"], of_cell]), axis=1).T) == len(donors)
    condition = of_cell[first] if alone else np.zeros_like(first)
    if by == "auto" and min(np.bincount(condition)[np.unique(condition)]) < DONORS:
        log.info("%d donors are too few to hold some out: split by cell", len(donors))
        return split_strata(codes["label"], fractions, seed)
    of_row = condition[np.searchsorted(donors, codes["donor"])]
    found: dict[str, list[Codes]] = {name: [] for name in fractions}
    for kind in np.unique(of_row):
        rows = np.flatnonzero(of_row == kind)
        groups = np.unique(codes["donor"][rows], return_inverse=True)[1]
        for name, members in split_groups(groups, fractions, seed).items():
            found[name].append(rows[members])
    return {name: np.sort(np.concatenate(parts)) for name, parts in found.items()}
