"""Pseudobulks: one donor each, known composition, determined by the seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stagesweep.data.derived import DerivedData
from stagesweep.run.context import Context
from stagesweep.systems.singlecell.simulate import simulated_cohort
from stagesweep.systems.singlecell.stage.pseudobulk import Pseudobulk

MakeRun = Callable[..., Context]


class Sums(nn.Module):
    """The latent of a cell is the counts of its first three genes."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": batch["counts"][:, :3]}


@pytest.fixture
def run(make_run: MakeRun) -> Context:
    run = make_run()
    run.data = simulated_cohort(donors=16, cells=40, genes=30, types=4)
    run.model, run.seed = Sums(), 5
    return run


def mixed(run: Context, **settings: Any) -> dict[str, np.ndarray]:
    Pseudobulk(n_samples=3, n_cells=50, **settings)(run)
    found: dict[str, np.ndarray] = run.load("pseudobulk.npz")
    return found


def test_a_pseudobulk_is_a_mixture_of_cells_of_one_donor(run: Context) -> None:
    made = mixed(run)
    cells = run.data
    donors = []
    for split in ("train", "val", "test"):
        (batch,) = cells.split(split).batches(10**6)
        own = {k.partition("/")[2]: v for k, v in made.items() if k.startswith(f"{split}/")}
        donors += own["donor"].tolist()
        assert set(own["donor"]) == set(batch["donor"].tolist())
        for n, donor in enumerate(own["donor"]):
            there = (batch["donor"] == donor).numpy()
            condition = batch["condition"].numpy()[there]
            assert set(condition) == {own["condition"][n]}
            # No cell of another donor: a gene that none of its cells has is not in the mixture.
            unseen = batch["counts"].numpy()[there].sum(0) == 0
            assert not own["counts"][n][unseen].any()
            kinds = np.bincount(batch["label"].numpy()[there], minlength=4) > 0
            assert not own["types"][n][~kinds].any()
        np.testing.assert_allclose(own["proportions"].sum(1), 1, rtol=1e-5)
        np.testing.assert_allclose((own["proportions"] * 50) % 1, 0, atol=1e-4)
        assert (own["types"] == (own["proportions"] > 0)).all()
        # States times the number of cells are the latents of all cells that were drawn.
        total = (own["states"] * own["proportions"][..., None] * 50).sum(1)
        np.testing.assert_allclose(total, own["counts"][:, :3], rtol=1e-4, atol=1e-3)
        cpm = np.log1p(own["counts"] / own["counts"].sum(1, keepdims=True) * 1e6)
        np.testing.assert_allclose(own["expression"], cpm, rtol=1e-5)
    assert np.bincount(donors).tolist() == [3] * 16


def test_the_seed_determines_mixtures_and_a_share_is_sparse(run: Context) -> None:
    first, again = mixed(run), mixed(run)
    assert all((first[name] == again[name]).all() for name in first)
    run.seed = 6
    assert (mixed(run)["train/proportions"] != first["train/proportions"]).any()
    full = mixed(run, sparse=0.0)["train/types"].mean()
    assert mixed(run, sparse=1.0)["train/types"].mean() < 0.75 < full


def test_pseudobulks_are_a_data_set(run: Context) -> None:
    mixed(run)
    made = DerivedData.from_arrays(run.load("pseudobulk.npz"), run.load("pseudobulk.json"))
    assert len(made.spec.features["communication"].names) == 6
    assert made.spec.labels == {"condition": 2}
    run.select(None, "pseudobulk")
    view = run.view("val")
    assert len(view) == len(made.ids("val"))
    torch.testing.assert_close(view["states"], made.split("val")["states"])
