"""The context of a stage: its artifacts, its model, its predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import execution_whitelist

from stagesweep.base.errors import UserError
from stagesweep.config import schema, trust
from stagesweep.run.context import Context
from stagesweep.stage.fit import Fit
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


def test_a_file_that_a_stage_writes_itself_is_found_by_its_name(run: Context) -> None:
    path = run.file("deep/large.npy")
    np.save(path, np.arange(4))
    assert np.load(run.find("deep/large.npy")).tolist() == [0, 1, 2, 3]
    assert run.file("progress.json", "checkpoints").parent.name == "checkpoints"
    run.file("progress.json", "checkpoints").write_text("{}")
    assert not run.has("progress.json"), "progress is no artifact"
    run.forget_checkpoints()
    assert not run.file("progress.json", "checkpoints").exists()
    with pytest.raises(UserError, match=r"stage pretrain needs 'x.npy', which no earlier"):
        run.find("x.npy")


def test_a_fit_apart_is_reused_alone(run: Context) -> None:
    data, model = run.data, run.model
    settings = Fit(epochs=1, batch_size=32, loss={"reconstruction": schema.Weight()})
    start = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name in start if name.startswith("encoder.")]

    def fit(number: int, clips: int) -> tuple[dict[str, float], str]:
        rows = torch.arange(clips)
        views = {split: data.split(split).take(rows) for split in ("train", "val")}
        model.load_state_dict(start)
        return run.fit_apart(model, settings, f"pretrain_{number}", views, {"n": clips}, names)

    first = [fit(0, 32), fit(1, 32)]
    trained = {name: model.state_dict()[name].clone() for name in names}
    assert [status for _, status in first] == ["trained", "trained"]
    assert [fit(0, 32)[1], fit(1, 64)[1]] == ["reused", "trained"], "its data alone has changed"
    metrics, status = fit(1, 32)
    assert (metrics, status) == (first[1][0], "reused")
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name] if name in names else start[name])
    assert len(run.history("pretrain_1")) == 1, "its rows are there once"
    run.seed += 1
    assert fit(0, 32)[1] == "trained", "with another seed it is another fit"


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
