"""The single-cell data set: valid and invalid files, in memory and backed, splits, filters."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csc_matrix, csr_matrix

from stagesweep.base.errors import UserError
from stagesweep.systems.singlecell.data.dataset import SPLITS, Columns, SingleCell, pbmc68k
from stagesweep.systems.singlecell.data.h5ad import CountTable

NAMED = Columns("kind", "who", "state")
Write = Callable[..., str]


def table(n: int = 240, donors: int = 20, genes: int = 30) -> CountTable:
    """Cells of three types and of donors in two conditions; the last gene is in no cell."""
    random = np.random.default_rng(0)
    counts = random.poisson(1.0, (n, genes)).astype(np.float32)
    counts[:, -1] = 0
    donor = np.sort(np.arange(n) % donors)
    kind = np.array(["a", "b", "c"])[random.integers(3, size=n)]
    obs = {"kind": kind, "who": donor.astype(str), "state": np.array(["x", "y"])[donor % 2]}
    cells = pd.DataFrame(obs, index=[f"cell{row}" for row in range(n)])
    return CountTable("t", [f"g{gene}" for gene in range(genes)], cells, csr_matrix(counts))


def whole(data: SingleCell, split: str) -> dict[str, torch.Tensor]:
    """A split in one batch."""
    (batch,) = data.split(split).prepare(torch.device("cpu"), 0).batches(10**6)
    return batch


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a table as an .h5ad file: `write(table, X=…, layers=…)`."""
    anndata = pytest.importorskip("anndata", reason="needs the extra singlecell")

    def written(cells: CountTable, name: str = "cells.h5ad", **parts: Any) -> str:
        var = pd.DataFrame(index=cells.genes)
        parts = {"X": cells.counts} | parts
        with (
            warnings.catch_warnings(),
            anndata.settings.override(allow_write_nullable_strings=True),
        ):
            warnings.simplefilter("ignore")
            anndata.AnnData(obs=cells.obs, var=var, **parts).write_h5ad(tmp_path / name)
        return str(tmp_path / name)

    return written


# ------------------------------------------------------------------------------ splits


def test_no_donor_is_in_two_splits_and_every_condition_in_all() -> None:
    data = SingleCell(table(), NAMED)
    donors = {split: set(whole(data, split)["donor"].tolist()) for split in SPLITS}
    assert sum(map(len, donors.values())) == len(set().union(*donors.values())) == 20
    assert all(set(whole(data, split)["condition"].tolist()) == {0, 1} for split in SPLITS)


def test_few_donors_are_split_by_cell_with_the_shares_of_each_type_kept() -> None:
    data = SingleCell(table(donors=4), NAMED)
    rows = np.concatenate([data.ids(split) for split in SPLITS])
    assert len(rows) == len(set(rows)) == 240
    for kind in range(3):
        shares = [int((whole(data, split)["label"] == kind).sum()) for split in SPLITS]
        assert shares[0] / sum(shares) == pytest.approx(0.7, abs=0.02)


def test_a_split_by_donor_needs_the_column() -> None:
    with pytest.raises(UserError, match=r"split_by=donor needs data\.columns\.donor"):
        SingleCell(table(), Columns("kind"), split_by="donor")
    with pytest.raises(UserError, match="must be auto, donor or cell"):
        SingleCell(table(), NAMED, split_by="litter")


# ------------------------------------------------------------------------------ filters


def test_genes_are_filtered_on_training_cells() -> None:
    cells = table()
    test = SingleCell(cells, NAMED).ids("test")
    only = np.isin(cells.obs.index, test)
    dense = cells.counts.toarray()
    dense[:, 5] = only  # a gene of test cells only
    cells.counts = csr_matrix(dense)
    genes = SingleCell(cells, NAMED).spec.features["counts"].names
    assert "g5" not in genes
    assert "g29" not in genes
    assert len(genes) == 28


def test_cells_with_few_genes_and_of_dropped_types_are_left_out() -> None:
    cells = table()
    dense = cells.counts.toarray()
    dense[:7, 1:] = 0
    cells.counts = csr_matrix(dense)
    data = SingleCell(cells, NAMED, min_genes=2, drop=["b"])
    names = np.concatenate([data.ids(split) for split in SPLITS])
    assert not {f"cell{row}" for row in range(7)} & set(names)
    assert data.label_names["label"] == ["a", "c"]


def test_the_library_is_the_sum_of_the_genes_that_are_kept() -> None:
    batch = whole(SingleCell(table(), NAMED, variable=10), "val")
    assert batch["counts"].shape[1] == 10
    assert torch.equal(batch["library"], batch["counts"].sum(1, keepdim=True).clamp(min=1))


def test_variable_genes_are_selected_on_training_cells() -> None:
    cells = table()
    dense = cells.counts.toarray()
    dense[:, 3] *= np.arange(240) % 5  # clearly not Poisson
    test = np.isin(cells.obs.index, SingleCell(cells, NAMED).ids("test"))
    dense[:, 8] = np.where(test, dense[:, 8] * (np.arange(240) % 9), dense[:, 8])
    cells.counts = csr_matrix(dense)
    assert SingleCell(cells, NAMED, variable=1).spec.features["counts"].names == ("g3",)


# ------------------------------------------------------------------------------ files


@pytest.mark.parametrize("dense", [False, True])
def test_a_backed_file_gives_the_same_as_memory(write: Write, dense: bool) -> None:
    cells = table()
    path = write(cells, X=cells.counts.toarray()) if dense else write(cells)
    ours, backed, given = (
        SingleCell(source, NAMED, variable=12, backed=backed)
        for source, backed in ((path, False), (path, True), (cells, False))
    )
    for split in SPLITS:
        batches = [whole(data, split) for data in (ours, backed, given)]
        for name, column in batches[0].items():
            assert all(torch.equal(column, batch[name]) for batch in batches), name


def test_an_epoch_of_a_backed_file_visits_every_cell_once(write: Write) -> None:
    data = SingleCell(write(table()), NAMED, backed=True)
    view = data.split("train").prepare(torch.device("cpu"), workers=1)
    order = list(view.order(50, torch.Generator().manual_seed(3)))
    rows = torch.cat(order)
    assert sorted(rows.tolist()) == list(range(len(view)))
    assert rows.tolist() != sorted(rows.tolist())
    batches = list(view.gather(order, start=1))
    assert torch.equal(torch.cat([batch["index"] for batch in batches]), torch.cat(order[1:]))
    assert torch.equal(batches[0]["counts"], whole(data, "train")["counts"][order[1]])


def test_a_layer_and_raw_hold_counts_as_well(write: Write) -> None:
    cells = table()
    path = write(cells, X=cells.counts.log1p(), layers={"counts": cells.counts})
    for backed in (False, True):
        data = SingleCell(path, NAMED, layer="counts", backed=backed)
        assert torch.equal(
            data.split("val")["label"], SingleCell(cells, NAMED).split("val")["label"]
        )
        assert (
            whole(data, "val")["counts"].max()
            == whole(SingleCell(cells, NAMED), "val")["counts"].max()
        )


def test_the_blood_cells_of_scanpy(real_data: Path) -> None:
    pytest.importorskip("scanpy", reason="needs the extra singlecell")
    data = pbmc68k(min_cells=1)
    assert [len(data.ids(split)) for split in SPLITS] == [490, 68, 142]
    file = real_data / "singlecell" / "pbmc68k_reduced_counts_700.h5ad"
    same = SingleCell(
        str(file), Columns("bulk_labels"), min_cells=1, fractions=(0.7, 0.1, 0.2), split_by="cell"
    )
    assert torch.equal(whole(data, "test")["counts"], whole(same, "test")["counts"])


def test_real_cells_of_few_donors_under_two_conditions(real_data: Path) -> None:
    pytest.importorskip("anndata", reason="needs the extra singlecell")
    path = str(real_data / "singlecell" / "kang_muscat_1556.h5ad")
    columns = Columns("cluster_id", "donor_id", "group_id")
    with pytest.raises(UserError, match=r"donor '101' is in 2 conditions \(ctrl, stim\).*paired"):
        SingleCell(path, columns)
    data = SingleCell(path, columns, paired=True)
    assert data.spec.labels == {"label": 5, "donor": 2, "condition": 2}
    assert sum(len(data.split(split)) for split in SPLITS) == 1556


# ------------------------------------------------------------------------------ bad input


def spoilt(value: float) -> csr_matrix:
    counts = table().counts.copy()
    counts.data[17] = value
    return counts


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"X": spoilt(np.nan)}, r"holds nan \(gene 'g\d+'\); fix that file"),
        (
            {"X": spoilt(-2)},
            "holds negative values, not counts .*none of its layers holds counts",
        ),
        (
            {"X": table().counts.log1p(), "layers": {"umi": table().counts}},
            "holds log-transformed values, not counts; its layer 'umi' holds .*: data.layer=umi",
        ),
    ],
    ids=["nan", "negative", "log"],
)
@pytest.mark.parametrize("backed", [False, True])
def test_values_that_are_not_counts(
    write: Write, parts: dict[str, Any], text: str, backed: bool
) -> None:
    with pytest.raises(UserError, match=text) as error:
        SingleCell(write(table(), **parts), NAMED, backed=backed)
    assert "\n" not in str(error.value)


def test_invalid_files(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "cells.h5ad"
    path.write_text("gene,cell\n")
    for backed in (False, True):
        with pytest.raises(UserError, match=r"cells.h5ad is not a readable \.h5ad file"):
            SingleCell(str(path), NAMED, backed=backed)
    wrong = write(table(), X=csc_matrix(table().counts))
    with pytest.raises(UserError, match=r"stored gene by gene \(CSC\).*data.backed=false"):
        SingleCell(wrong, NAMED, backed=True)
    assert SingleCell(wrong, NAMED).spec.labels["label"] == 3
    with pytest.raises(UserError, match=r"no layer 'umi' in .* which has none"):
        SingleCell(wrong, NAMED, layer="umi")


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize(
    "member", ["X/indices", "X/indptr", "X/data", "obs/_index/values", "var/_index/values"]
)
def test_a_file_whose_parts_do_not_go_together_is_refused(
    write: Write, member: str, backed: bool
) -> None:
    h5py = pytest.importorskip("h5py")
    path = write(table())
    with h5py.File(path, "r+") as root:
        values = root[member][:]
        del root[member]
        # An index beyond the genes would be read from memory of others.
        root[member] = values + 1000 if member == "X/indices" else values[:-3]
        root[member].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    with pytest.raises(UserError, match=r"cells.h5ad is (not a readable \.h5ad file|damaged)"):
        SingleCell(path, NAMED, backed=backed)


@pytest.mark.parametrize("backed", [False, True])
def test_counts_too_large_for_fp32_are_refused(write: Write, backed: bool) -> None:
    counts = table().counts.astype(np.float64)
    counts.data[0] = 1e300
    with pytest.raises(UserError, match=r"cells.h5ad holds inf \(gene 'g\d+'\)"):
        SingleCell(write(table(), X=counts), NAMED, backed=backed)


def test_a_column_that_is_missing_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"no obs column 'kinds' in t; the nearest are kind, .*label"
    ):
        SingleCell(table(), Columns("kinds"))


def test_invalid_labels() -> None:
    cells = table()
    cells.obs.iloc[0, 0] = "rare"
    with pytest.raises(UserError, match=r"one cell of type 'rare'.*'data.drop=\[\"rare\"\]'"):
        SingleCell(cells, NAMED)
    assert "rare" not in SingleCell(cells, NAMED, drop=["rare"]).label_names["label"]
    cells.obs["who"] = cells.obs["who"].where(cells.obs["who"] != "3")
    with pytest.raises(UserError, match="12 cells have no donor"):
        SingleCell(cells, NAMED, drop=["rare"])


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anndata", None)
    wanted = r'needs anndata, which is not installed: pip install "stagesweep\[singlecell\]"'
    with pytest.raises(UserError, match=wanted):
        SingleCell("x.h5ad", NAMED)


def test_cells_that_occur_twice() -> None:
    cells = table(donors=4)
    cells.obs.index = [f"cell{row % 180}" for row in range(240)]
    with pytest.raises(UserError, match=r"'cell0', 'cell1', 'cell2' and 57 .*_cells=unique$"):
        SingleCell(cells, NAMED)
    data = SingleCell(cells, NAMED, duplicate_cells="unique")
    ids = [data.ids(split).tolist() for split in SPLITS]
    assert len({name for names in ids for name in names}) == 240
    barcodes = [{name.removesuffix("-1") for name in names} for names in ids]
    assert sum(map(len, barcodes)) == len(set.union(*barcodes)) == 180


@pytest.mark.parametrize("backed", [None, False, True])
def test_genes_that_occur_twice(write: Write, backed: bool | None) -> None:
    cells = table()
    cells.genes[3] = cells.genes[1]
    source = cells if backed is None else write(cells)
    with pytest.raises(UserError, match=r"'g1': more than once in .*genes=unique or merge$"):
        SingleCell(source, NAMED, backed=bool(backed))
    data = SingleCell(source, NAMED, backed=bool(backed), duplicate_genes="unique")
    assert data.spec.features["counts"].names[:4] == ("g0", "g1", "g2", "g1-1")
    data = SingleCell(source, NAMED, backed=bool(backed), duplicate_genes="merge")
    assert data.spec.features["counts"].names[:4] == ("g0", "g1", "g2", "g4")
    rows = cells.obs.index.get_indexer(data.ids("train"))
    expected = cells.counts.toarray()[rows][:, [1, 3]].sum(1)
    assert whole(data, "train")["counts"][:, 1].tolist() == expected.tolist()
