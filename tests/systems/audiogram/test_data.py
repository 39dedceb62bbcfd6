"""The audiogram reader: scaling, masks, codes and errors."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.decomposition import PCA

from stagesweep.base.errors import UserError
from stagesweep.systems.audiogram.data import Audiogram, Columns

SPLITS = ("train", "val", "test")
COLUMNS = Columns(
    thresholds={"6kHz": "abr_6khz", "12kHz": "abr_12khz", "click": "abr_click"},
    metadata={"age": "age_in_days", "weight": "weight"},
    categories={"sex": "sex", "background": "strain"},
    labels={"gene": "gene_symbol", "litter": "litter_id", "centre": "centre"},
    equipment=["centre", "model"],
    id="specimen_id",
)


@pytest.fixture
def table():
    """300 animals of two centres that differ in level and spread; a third centre has 6."""
    random = np.random.default_rng(0)
    centre = np.where(np.arange(300) < 6, "tiny", np.where(np.arange(300) % 3 == 0, "A", "B"))
    level = np.where(centre == "A", 30, 50)[:, None]
    decibels = (level + random.normal(0, 1, (300, 3)) * np.where(level < 40, 3, 9)).round(1)
    table = pd.DataFrame(decibels, columns=list(COLUMNS.thresholds.values()))
    table["abr_click"] = table["abr_click"].where(random.random(300) > 0.37)
    table["age_in_days"] = random.integers(90, 120, 300)
    table["weight"] = np.where(random.random(300) < 0.1, np.nan, random.normal(25, 3, 300))
    table["sex"] = np.where(random.random(300) < 0.5, "male", "female")
    table["strain"] = random.choice(["6N", "6NJ"], 300)
    table["gene_symbol"] = pd.Series([f"gene{row // 4}" for row in range(300)]).where(
        random.random(300) > 0.2
    )
    table["litter_id"] = [str(row // 3) for row in range(300)]
    table["centre"], table["model"] = centre, "Smart EP"
    table["specimen_id"] = [f"mouse{row}" for row in range(300)]
    return table.sample(frac=1, random_state=0, ignore_index=True)


def rows_of(data, table, split):
    return table.set_index("specimen_id").loc[data.ids(split)]


def test_a_file_and_a_table_give_the_same(table, tmp_path):
    path = tmp_path / "mice.csv"
    table.to_csv(path, index=False)
    from_table, from_file = Audiogram(table, COLUMNS), Audiogram(str(path), COLUMNS)
    assert from_table.spec == from_file.spec
    for split in SPLITS:
        for name, column in from_table.split(split).columns.items():
            assert torch.equal(column, from_file.split(split)[name]), name


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_european_file_gives_the_same(table, tmp_path, separator):
    path = tmp_path / "mice.csv"
    table.to_csv(path, index=False, sep=separator, decimal=",")
    here, there = Audiogram(table, COLUMNS), Audiogram(str(path), COLUMNS)
    for name, column in here.split("train").columns.items():
        assert torch.equal(column, there.split("train")[name]), name


def test_thresholds_go_back_to_decibels_and_gaps_are_masked(table):
    data = Audiogram(table, COLUMNS)
    for split in SPLITS:
        view, rows = data.split(split), rows_of(data, table, split)
        measured = rows[list(COLUMNS.thresholds.values())].to_numpy()
        mask = view["thresholds/mask"].numpy()
        np.testing.assert_array_equal(mask, ~np.isnan(measured))
        back = view["thresholds"] * view["thresholds/scale"] + view["thresholds/shift"]
        np.testing.assert_allclose(back.numpy()[mask], measured[mask], atol=1e-4)
        assert (view["thresholds"].numpy()[~mask] == 0).all()
        assert view["thresholds"].dtype == torch.float32


def test_z_scores_are_those_of_the_training_animals_with_the_same_equipment(table):
    data = Audiogram(table, COLUMNS)
    train = rows_of(data, table, "train")
    assert 0 < (train["centre"] == "tiny").sum() < 20
    for split in SPLITS:
        view, rows = data.split(split), rows_of(data, table, split)
        for centre in ("A", "B", "tiny"):
            same = train if centre == "tiny" else train[train["centre"] == centre]
            here = np.flatnonzero(rows["centre"] == centre)
            for number, column in enumerate(COLUMNS.thresholds.values()):
                shift, scale = same[column].mean(), same[column].std(ddof=0)
                np.testing.assert_allclose(view["thresholds/shift"][here, number], shift, rtol=1e-5)
                np.testing.assert_allclose(view["thresholds/scale"][here, number], scale, rtol=1e-5)


def test_global_scaling_is_the_same_for_all(table):
    view = Audiogram(table, COLUMNS, standardise="global").split("train")
    assert (view["thresholds/shift"] == view["thresholds/shift"][0]).all()
    observed = np.ma.masked_array(view["thresholds"], ~view["thresholds/mask"].numpy())
    np.testing.assert_allclose(observed.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(observed.std(axis=0), 1, atol=1e-5)


def test_an_equipment_unseen_in_training_is_scaled_like_all(table):
    data = Audiogram(table, COLUMNS)
    held_out = table["specimen_id"].isin(data.ids("test"))
    table.loc[held_out, "model"] = "new machine"
    data = Audiogram(table, COLUMNS)
    train = rows_of(data, table, "train")
    expected = train[list(COLUMNS.thresholds.values())].mean()
    np.testing.assert_allclose(data.split("test")["thresholds/shift"][0], expected, rtol=1e-5)


def test_nothing_is_fitted_on_held_out_animals(table):
    before = Audiogram(table, COLUMNS)
    held_out = ~table["specimen_id"].isin(before.ids("train"))
    table.loc[held_out, ["abr_6khz", "weight"]] = 90.0
    table.loc[held_out, "strain"] = "unseen"
    after = Audiogram(table, COLUMNS)
    assert after.spec == before.spec
    for name, column in before.split("train").columns.items():
        assert torch.equal(column, after.split("train")[name]), name
    assert (after.split("val")["background"] == 0).all()


def test_components_are_those_of_mean_imputed_z_scores(table):
    data = Audiogram(table, COLUMNS)
    scores = data.split("train")["thresholds"].numpy()
    reference = PCA(2, whiten=True).fit(scores)
    for split in SPLITS:
        view = data.split(split)
        expected = reference.transform(view["thresholds"].numpy())
        found = view["pca"].numpy()
        np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-4)
    assert data.spec.features["pca"].names == ("pc1", "pc2")
    assert "pca" not in Audiogram(table, COLUMNS, pca=0).spec.features


def test_metadata_categories_and_labels(table):
    data = Audiogram(table, COLUMNS)
    view, rows = data.split("train"), rows_of(data, table, "train")
    weight = rows["weight"]
    z = ((weight - weight.mean()) / weight.std(ddof=0)).fillna(0)
    np.testing.assert_allclose(view["metadata"][:, 1], z, atol=1e-5)
    np.testing.assert_array_equal(view["metadata/mask"][:, 1], weight.notna())
    assert data.spec.categories == {"sex": 3, "background": 3}
    np.testing.assert_array_equal(view["sex"], np.where(rows["sex"] == "female", 1, 2))
    names = np.array([*data.label_names["gene"], "none"])
    assert names[view["gene"]].tolist() == rows["gene_symbol"].fillna("none").tolist()
    assert data.label_names["equipment"] == ["A / Smart EP", "B / Smart EP", "tiny / Smart EP"]
    assert data.spec.labels["gene"] == len(names) - 1


def test_thresholds_are_drawn_downwards_and_the_click_on_its_own(table):
    features = Audiogram(table, COLUMNS).spec.features["thresholds"]
    assert features.inverted
    assert features.isolated == ("click",)
    assert features.unit == "dB SPL"


def test_without_frequencies_in_the_names_all_thresholds_are_connected(table):
    columns = Columns({"low": "abr_6khz", "high": "abr_12khz"})
    data = Audiogram(table, columns, standardise="global", pca=0)
    assert data.spec.features["thresholds"].isolated == ()


def test_genes_and_litters_stay_in_one_split(table):
    data = Audiogram(table, COLUMNS)
    for label in ("gene", "litter"):
        seen = [set(data.split(split)[label].tolist()) - {-1} for split in SPLITS]
        assert sum(map(len, seen)) == len(set.union(*seen))


def test_only_thresholds_are_needed(table):
    columns = Columns({"6kHz": "abr_6khz", "12kHz": "abr_12khz", "click": None})
    data = Audiogram(table, columns, standardise="global", pca=0)
    assert set(data.split("train").columns) == {
        *(f"thresholds{part}" for part in ("", "/mask", "/shift", "/scale")),
        "index",
    }
    assert data.spec.features["thresholds"].names == ("6kHz", "12kHz")
    assert data.ids("val")[0].isdigit()


def test_tiling_repeats_the_rows_of_each_split(table):
    once, thrice = Audiogram(table, COLUMNS), Audiogram(table, COLUMNS, tile=3)
    for split in SPLITS:
        for name, column in once.split(split).columns.items():
            if name != "index":
                assert torch.equal(torch.cat([column] * 3), thrice.split(split)[name]), name
        assert thrice.ids(split).tolist() == once.ids(split).tolist() * 3


def test_animals_without_thresholds_are_left_out_and_logged(table, caplog):
    table.loc[:4, list(COLUMNS.thresholds.values())] = np.nan
    with caplog.at_level(logging.WARNING):
        data = Audiogram(table, COLUMNS)
    assert sum(len(data.split(split)) for split in SPLITS) == 295
    assert "left out 5 animals without any threshold" in caplog.text


def changed(table, column, row, value):
    table[column] = table[column].astype(object)
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda t: t.drop(columns="abr_12khz"),
            {},
            r"no column 'abr_12khz' in the table; the nearest is 'abr_\w+' \(map it in data.col",
        ),
        (
            lambda t: changed(t, "abr_6khz", 7, 120.0),
            {},
            r"120 dB is outside 0 to 100: column 'abr_6khz', line 9 of the table; .*data.clip=true",
        ),
        (
            lambda t: changed(t, "weight", 3, "heavy"),
            {},
            r"'heavy' is not a number: column 'weight', line 5 of the table",
        ),
        (lambda t: t.assign(abr_6khz=np.nan, abr_12khz=np.nan, abr_click=np.nan), {}, "no thresho"),
        (lambda t: t.assign(abr_click=np.nan), {}, "'click' has no value in the train"),
        (lambda t: t, {"standardise": "centre"}, "data.standardise is equipment or global, not"),
        (lambda t: t, {"pca": 4}, "data.pca=4 is more than the 3 thresholds"),
        (lambda t: t, {"tile": 0}, "data.tile=0 must be at least 1"),
        (lambda t: t.assign(litter_id="1"), {}, "the train split is empty|the val split is empty"),
    ],
)
def test_bad_input_is_named(table, change, options, message):
    with pytest.raises(UserError, match=message):
        Audiogram(change(table), COLUMNS, **options)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("value", [1e9, -40.0])
def test_impossible_thresholds_are_refused_or_missing(table, tmp_path, value, clip):
    path = tmp_path / "mice.csv"
    changed(table, "abr_6khz", 7, value).to_csv(path, index=False)
    with pytest.raises(
        UserError,
        match=r"is not a possible value \(-20 to 140\): column 'abr_6khz', line 9 of .*mice.csv; "
        r"fix it, set data.out_of_range=missing, or set data.columns.ranges.thresholds",
    ):
        Audiogram(str(path), COLUMNS, clip=clip)
    data = Audiogram(str(path), COLUMNS, clip=clip, out_of_range="missing")
    gap = Audiogram(changed(table, "abr_6khz", 7, np.nan), COLUMNS)
    for split in SPLITS:
        assert torch.equal(data.split(split)["thresholds"], gap.split(split)["thresholds"])


def test_ranges_are_those_of_the_column_map(table):
    ranges = {"weight": (0, 60), "6kHz": (-100, None)}
    columns = dataclasses.replace(COLUMNS, ranges=ranges)
    Audiogram(changed(table.copy(), "abr_6khz", 7, -40.0), columns, clip=True)
    with pytest.raises(UserError, match=r"-1 is .*\(0 to 60\): column 'weight', line 9 .*weight$"):
        Audiogram(changed(table.copy(), "weight", 7, -1.0), columns)
    with pytest.raises(UserError, match=r"-40 is .*\(-20 to 140\): column 'abr_click'"):
        Audiogram(changed(table.copy(), "abr_click", 7, -40.0), columns)
    with pytest.raises(UserError, match=r"ranges\.wieght is the range of no column; .*weight"):
        dataclasses.replace(COLUMNS, ranges={"wieght": (0, 1)})
    with pytest.raises(UserError, match=r"data.out_of_range='drop' must be refuse or missing"):
        Audiogram(table, COLUMNS, out_of_range="drop")


def test_duplicate_ids(table):
    again = table.iloc[:60].assign(gene_symbol=None, litter_id=None)
    columns = dataclasses.replace(COLUMNS, labels={"centre": "centre"})
    twice = pd.concat([table, again], ignore_index=True)
    twice.loc[300:, "abr_6khz"] += 2
    first = ", ".join(f"'{name}'" for name in table["specimen_id"][:3])
    with pytest.raises(
        UserError, match=rf"^{first} and 57 more: .*data.duplicates=unique or merge"
    ):
        Audiogram(twice, columns)
    data = Audiogram(twice, columns, duplicates="unique")
    ids = [data.ids(split).tolist() for split in SPLITS]
    assert len({name for names in ids for name in names}) == 360
    animals = [{name.removesuffix("-1") for name in names} for names in ids]
    assert sum(map(len, animals)) == len(set.union(*animals)) == 300
    merged, mean = Audiogram(twice, columns, duplicates="merge"), table.copy()
    mean.loc[:59, "abr_6khz"] += 1
    expected = Audiogram(mean, columns)
    for split in SPLITS:
        assert merged.ids(split).tolist() == expected.ids(split).tolist()
        found, wanted = merged.split(split)["thresholds"], expected.split(split)["thresholds"]
        assert torch.allclose(found, wanted, atol=1e-5)
    twice.loc[300, "centre"] = "elsewhere"
    with pytest.raises(UserError, match=r"has several values of 'centre' in the table, so its"):
        Audiogram(twice, columns, duplicates="merge")


def test_clip_cuts_off(table):
    data = Audiogram(changed(table, "abr_6khz", 7, 120.0), COLUMNS, clip=True)
    views = [data.split(split) for split in SPLITS]
    back = [v["thresholds"] * v["thresholds/scale"] + v["thresholds/shift"] for v in views]
    assert torch.cat(back).max() == pytest.approx(100, abs=1e-3)


def test_invalid_column_maps_are_named(table):
    with pytest.raises(UserError, match=r"data\.columns uses the name 'sex' twice"):
        Columns({"6kHz": "a"}, categories={"sex": "sex"}, labels={"sex": "sex"})
    with pytest.raises(UserError, match=r"data\.columns\.thresholds is empty"):
        Columns({"6kHz": None})
    with pytest.raises(UserError, match=r"standardise=equipment needs data\.columns\.equipment"):
        Audiogram(table, Columns({"6kHz": "abr_6khz"}))
    with pytest.raises(UserError, match="no split 'training'; there are train, val, test"):
        Audiogram(table, COLUMNS).split("training")


@pytest.mark.parametrize(
    ("name", "file", "animals", "labels"),
    [
        ("audiogram", "impc_abr_labelled_1345.csv", 1344, {"gene": 728, "equipment": 14}),
        ("audiogram_unlabelled", "impc_abr_unlabelled_half.csv.gz", 28391, {"equipment": 15}),
    ],
)
def test_the_real_files_are_read_as_configured(real_data, name, file, animals, labels):
    conf = Path(__file__).parents[3] / "conf" / "data" / f"{name}.yaml"
    node = yaml.safe_load(conf.read_text())
    del node["_target_"], node["columns"]["_target_"]
    node["columns"] = Columns(**node["columns"])
    data = Audiogram(**node | {"path": str(real_data / "audiogram" / file)})
    assert sum(len(data.split(split)) for split in SPLITS) == animals
    assert labels.items() <= data.spec.labels.items()
    train = data.split("train")["thresholds"]
    assert train.mean(0).abs().max() < 0.1
