import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from stagesweep.base.errors import UserError
from stagesweep.systems.audiogram.digits import Digits


def test_training_images_are_scikit_learns_scaled_to_one() -> None:
    data = Digits()
    train = data.split("train")
    np.testing.assert_allclose(train["image"].numpy() * 16, load_digits().data)
    assert train["image"].max() == 1
    features = data.spec.features["image"]
    assert features.grid == (8, 8)
    assert len(features.names) == train["image"].shape[1]
    assert data.spec.labels == {"digit": 10}


def test_val_and_test_are_halves_with_the_same_share_of_each_digit() -> None:
    data = Digits()
    rows = {name: set(data.rows[name]) for name in ("val", "test")}
    assert not rows["val"] & rows["test"]
    assert rows["val"] | rows["test"] == set(range(1797))
    counts = [data.split(name)["digit"].bincount() for name in ("val", "test")]
    assert (counts[0] - counts[1]).abs().max() <= 1


def test_seed_draws_the_halves() -> None:
    assert Digits(seed=1).rows == Digits(seed=1).rows
    assert Digits(seed=1).rows["val"] != Digits(seed=2).rows["val"]


def test_views_number_their_own_rows() -> None:
    val = Digits().split("val")
    assert torch.equal(val["index"], torch.arange(len(val)))


def test_ids_are_the_rows_of_scikit_learns_set() -> None:
    data, images = Digits(), load_digits().data
    assert data.ids("train").tolist() == [str(row) for row in range(1797)]
    for name in ("val", "test"):
        rows = data.ids(name).astype(int)
        np.testing.assert_allclose(data.split(name)["image"].numpy() * 16, images[rows])


def test_an_unknown_split_is_named() -> None:
    data = Digits()
    for ask in (data.split, data.ids):
        with pytest.raises(UserError, match="no split 'dev': choose from train, val, test"):
            ask("dev")
