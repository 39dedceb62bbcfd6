"""The context of a stage: its artifacts, its model, its predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import execution_whitelist

from stagesweep.base.errors import UserError
from stagesweep.config import trust
from stagesweep.run.context import Context
from stagesweep.store.store import Store
from stagesweep.tracking.tensorboard import TensorBoardWriter


@pytest.fixture
def run(compose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The context of a run of digits, within its first stage."""
    monkeypatch.setenv("STAGESWEEP_STORE", str(tmp_path / "store"))
    writer = TensorBoardWriter(tmp_path / "run" / "tensorboard")
    context = Context(compose("experiment=digits"), tmp_path / "run", [], writer)
    entry = Store.default().entry("0" * 32)
    context._entry, context.stage = entry, "pretrain"
    entry.begin(fresh=False)
    with execution_whitelist(trust.trusted()):
        yield context
    writer.close()


def test_artifacts_are_loaded_as_saved(run: Context) -> None:
    run.save("table.csv", pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
    run.save("arrays.npz", {"x": np.arange(3), "names": np.array(["a", "b"])})
    run.save("plain.json", {"k": 3})
    assert run.load("table.csv")["b"].tolist() == ["x", "y"]
    assert run.load("arrays.npz")["x"].tolist() == [0, 1, 2]
    assert run.load("plain.json") == {"k": 3}
    assert run.has("plain.json")
    assert not run.has("other.json")
    with pytest.raises(UserError, match=r"needs 'other.json', which no earlier stage saved"):
        run.load("other.json")


def test_a_model_has_the_same_initial_weights_whenever_it_is_built(run: Context) -> None:
    first = run.build_model().state_dict()
    torch.rand(3)
    state = torch.get_rng_state()
    second = run.build_model().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_predictions_cover_a_split_in_order(run: Context) -> None:
    found = run.predict("val", ["mean", "index"])
    assert found["index"].tolist() == list(range(len(run.view("val"))))
    assert found["mean"].shape == (len(run.view("val")), run.cfg.model.latent)
    with pytest.raises(UserError, match="the model gives no 'nothing'"):
        run.predict("val", ["nothing"])
