"""What a run makes of its config, and how stages hand things on."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import execution_whitelist
from omegaconf import OmegaConf
from torch import nn

from stagesweep.base.errors import UserError
from stagesweep.config import schema, trust
from stagesweep.config.access import targets
from stagesweep.core import checkpoint
from stagesweep.run.build import build_stage, init_from
from stagesweep.run.context import Run
from stagesweep.run.runner import without_nan
from stagesweep.stage.fit import Fit
from stagesweep.store.stage_inputs import content_hash, inputs, what_counts
from stagesweep.store.store import Store
from stagesweep.store.tensorboard import TensorBoardWriter


@pytest.fixture
def run(compose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of digits that has not walked its stages; its first stage's entry is open."""
    monkeypatch.setenv("STAGESWEEP_STORE", str(tmp_path / "store"))
    board = TensorBoardWriter(tmp_path / "run" / "tensorboard")
    made = Run(compose("experiment=digits"), tmp_path / "run", [], board)
    entry = Store.default().entry("0" * 32)
    made._entry, made.stage = entry, "pretrain"
    entry.begin(fresh=False)
    with execution_whitelist(trust.trusted()):
        yield made
    board.close()


def test_fields_that_change_no_result_are_left_out() -> None:
    node = OmegaConf.structured(schema.Fit(epochs=3))
    counted = what_counts(node)
    assert counted["epochs"] == 3
    assert counted["optimizer"]["lr"] == schema.Optimizer().lr
    assert counted["optimizer"]["betas"] == (0.9, 0.999)
    skipped = {"save_every", "save_seconds", "keep_last", "log_every", "histogram_every"}
    assert not skipped & set(counted)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=7", "all"),
        ("model.latent=3", "all"),
        ("hardware.precision=bf16", "all"),
        ("stage.joint.optimizer.lr=0.5", "joint"),
        ("stage.joint.loss.kl.weight=0.123", "joint"),
        ("loss.clustering.every=99", "joint"),
        ("stage.joint.save_every=9", "none"),
        ("hardware.workers=3", "none"),
        ("hardware.micro_batch=9", "none"),
        ("objective.mode=min", "none"),
    ],
)
def test_a_stage_reads_what_can_change_it_and_no_more(
    compose: Any, override: str, changed: str
) -> None:
    before = inputs(compose("experiment=digits"))
    after = inputs(compose("experiment=digits", override))
    found = {name for name in before if before[name] != after[name]}
    assert found == {"all": set(before), "joint": {"joint"}, "none": set()}[changed]


def test_how_a_machine_is_used_is_no_input_of_a_stage(compose: Any) -> None:
    """All that a profile may say but precision and tf32; and this is no GPU, so tf32 is nothing."""
    plain = compose("experiment=digits", "hardware=cpu", "hardware.precision=bf16")
    card = compose("experiment=digits", "hardware=h200_141gb_x4_2nodes", "hardware.device=cpu")
    assert card.hardware != plain.hardware
    assert inputs(card) == inputs(plain)


def test_a_data_file_counts_by_its_content_not_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.csv").write_text("x\n1\n")
    assert content_hash(tmp_path / "a.csv") == content_hash(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text("x\n2\n")
    assert content_hash(tmp_path / "a.csv") != content_hash(tmp_path / "b.csv")
    before = content_hash(tmp_path)
    (tmp_path / "c.csv").write_text("")
    assert content_hash(tmp_path) != before
    with pytest.raises(UserError, match=r"no such file or folder: .*nowhere"):
        content_hash(tmp_path / "nowhere")


def test_every_target_is_found_at_any_depth() -> None:
    nested = {"_target_": "a.B", "x": [{"_target_": "c.D", "y": {"_target_": "e.F"}}], "z": 1}
    assert targets(nested) == {"a.B", "c.D", "e.F"}


def test_a_stage_is_built_from_its_schema_with_open_fields_instantiated() -> None:
    node = OmegaConf.structured(schema.Fit(epochs=2, sampler={"_target_": "torch.nn.Identity"}))
    with execution_whitelist(trust.trusted()):
        stage = build_stage(node)
    assert isinstance(stage, Fit)
    assert isinstance(stage.optimizer, schema.Optimizer)
    assert isinstance(stage.sampler, nn.Identity)


def test_artifacts_come_back_as_they_were_left(run: Run) -> None:
    run.save("table.csv", pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
    run.save("arrays.npz", {"x": np.arange(3), "names": np.array(["a", "b"])})
    run.save("plain.json", {"k": 3})
    assert run.load("table.csv")["b"].tolist() == ["x", "y"]
    assert run.load("arrays.npz")["x"].tolist() == [0, 1, 2]
    assert run.load("plain.json") == {"k": 3}
    assert run.has("plain.json")
    assert not run.has("other.json")
    with pytest.raises(UserError, match=r"needs 'other.json', which no stage before it left"):
        run.load("other.json")


def test_a_model_is_the_same_whenever_it_is_built(run: Run) -> None:
    first = run.build_model().state_dict()
    torch.rand(3)
    state = torch.get_rng_state()
    second = run.build_model().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_predictions_cover_a_split_in_order(run: Run) -> None:
    found = run.predict("val", ["mean", "index"])
    assert found["index"].tolist() == list(range(len(run.view("val"))))
    assert found["mean"].shape == (len(run.view("val")), run.cfg.model.latent)
    with pytest.raises(UserError, match="the model gives no 'nothing'"):
        run.predict("val", ["nothing"])


def test_init_from_takes_what_fits_and_says_what_it_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("test")
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    path = tmp_path / "weights.pt"
    state = {"weight": source.weight.detach(), "bias": torch.zeros(5)}
    checkpoint.save(path, {"model": state})
    with caplog.at_level(logging.INFO):
        init_from(target, path, log)
    assert torch.equal(target.weight, source.weight)
    assert "1 of 2 tensors" in caplog.text
    assert "left as initialised: bias" in caplog.text
    checkpoint.save(path, {"model": {"other": torch.zeros(1)}})
    with pytest.raises(UserError, match="fits no parameter of this model"):
        init_from(target, path, log)


def test_json_has_no_nan() -> None:
    assert without_nan({"a": [math.nan, math.inf, 1.0], "b": "x"}) == {
        "a": [None, None, 1.0],
        "b": "x",
    }


def test_a_fit_inside_another_stage_counts_with_its_loss_terms(compose: Any) -> None:
    found = inputs(compose("experiment=digits"))
    assert set(found["baselines"]["loss"]) == {"reconstruction"}
    assert set(found["evaluate"]["loss"]) == set()
