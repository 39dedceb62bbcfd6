"""The inputs of each stage, as covered by its fingerprint."""

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig, OmegaConf

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.config.nodes import hardware_settings
from stagesweep.hardware.numerics import numerics
from stagesweep.store.listed_files import listed_files
from stagesweep.store.stage_inputs import hash_path, inputs, relevant


def stage_inputs(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    return inputs(cfg, numerics(hardware_settings(cfg)))


def test_fields_that_change_no_result_are_left_out() -> None:
    node = OmegaConf.structured(schema.Fit(epochs=3))
    counted = relevant(node)
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
def test_inputs_of_a_stage_are_the_settings_that_can_change_it(
    compose: Any, override: str, changed: str
) -> None:
    before = stage_inputs(compose("experiment=digits", "hardware.device=cpu"))
    after = stage_inputs(compose("experiment=digits", "hardware.device=cpu", override))
    found = {name for name in before if before[name] != after[name]}
    assert found == {"all": set(before), "joint": {"joint"}, "none": set()}[changed]


def test_hardware_settings_are_not_inputs_of_a_stage(compose: Any) -> None:
    """Only precision and tf32 count, and tf32 does nothing on a CPU."""
    plain = compose("experiment=digits", "hardware=cpu", "hardware.precision=bf16")
    card = compose("experiment=digits", "hardware=h200_141gb_x4_2nodes", "hardware.device=cpu")
    assert card.hardware != plain.hardware
    assert stage_inputs(card) == stage_inputs(plain)


def test_a_data_file_counts_by_content_not_path(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.csv").write_text("x\n1\n")
    assert hash_path(tmp_path / "a.csv") == hash_path(tmp_path / "b.csv")
    (tmp_path / "b.csv").write_text("x\n2\n")
    assert hash_path(tmp_path / "a.csv") != hash_path(tmp_path / "b.csv")
    before = hash_path(tmp_path)
    (tmp_path / "c.csv").write_text("")
    assert hash_path(tmp_path) != before
    with pytest.raises(UserError, match=r"no such file or folder: .*nowhere"):
        hash_path(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "semicolon.csv"])
def test_files_that_a_table_names_count_by_name_size_and_time(
    compose: Any, tmp_path: Path, kind: str
) -> None:
    table, first, second = tmp_path / f"t.{kind}", tmp_path / "a, 1.wav", tmp_path / "b.wav"
    rows = pd.DataFrame({"wav": [first.name, second.name, "gone.wav"], "transcript": "x"})
    if kind == "jsonl":
        rows.to_json(table, orient="records", lines=True)
    else:
        rows.to_csv(table, sep=";" if kind == "semicolon.csv" else ",", index=False)
    for path in (first, second):
        path.write_text("sound")
    words = ("experiment=speech_digits", f"data.path={table}", "data.columns.path=wav")

    cfg = compose(*words, "hardware.device=cpu")

    def found() -> dict[str, Any]:
        return stage_inputs(cfg)["base"]["data"]

    before = found()
    assert found() == before
    second.write_text("other")  # of the same size
    os.utime(second, ns=(1, 1))
    replaced = found()
    assert {key for key in before if replaced[key] != before[key]} == {"files"}
    (tmp_path / "gone.wav").write_text("sound")
    assert found() not in (before, replaced)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    now = found()
    for path in (table, first, second, tmp_path / "gone.wav"):
        shutil.move(path, elsewhere)
    cfg.data.path = str(elsewhere / table.name)
    assert found() == now, "the place of the folder does not count"


def test_a_checkpoint_counts_by_its_files_or_its_name(compose: Any, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,transcript\n")
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "model.safetensors").write_text("one")

    def found(path: Path | str) -> tuple[Any, Any]:
        words = ("experiment=speech_full", f"data.path={tmp_path / 't.csv'}", f"model.path={path}")
        stage = stage_inputs(compose(*words, "hardware.device=cpu"))["extract"]
        return stage["model"]["path"], stage["data"]["pretrained"]

    first = found(tmp_path / "whisper")
    (tmp_path / "whisper").rename(tmp_path / "other")
    assert found(tmp_path / "other") == first
    (tmp_path / "other" / "model.safetensors").write_text("three")
    second = found(tmp_path / "other")
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert found("openai/whisper-tiny") == ("openai/whisper-tiny",) * 2


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("model.rank=4", {"extract"}),
        ("model.experts=4", {"extract"}),
        ("model.k=1", {"extract", "cluster"}),
        ("model.temperature=[4,1]", {"extract", "cluster"}),
        ("stage.cluster.reduce=none", {"extract", "gate", "experts", "asr", "evaluate", "figures"}),
        ("model.path=other", set()),
    ],
)
def test_a_stage_may_name_keys_of_the_model_that_it_does_not_use(
    compose: Any, tmp_path: Path, override: str, same: set[str]
) -> None:
    (tmp_path / "t.csv").write_text("path,transcript\n")
    words = ("experiment=speech_full", f"data.path={tmp_path / 't.csv'}", "hardware.device=cpu")
    before, after = (stage_inputs(compose(*each)) for each in (words, (*words, override)))
    assert {name for name in before if before[name] == after[name]} == same


def test_a_table_that_cannot_be_read_names_no_files(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    assert listed_files(table, "path") == []
    table.write_bytes(b"path\n\xff\n")
    assert listed_files(table, "path") == []
    table.write_text("other\nx\n")
    assert listed_files(table, "path") == []
    table.with_suffix(".jsonl").write_text("{broken\n")
    assert listed_files(table.with_suffix(".jsonl"), "path") == []
    table.with_suffix(".jsonl").write_text("[1]\n")
    assert listed_files(table.with_suffix(".jsonl"), "path") == []


def test_a_fit_inside_another_stage_counts_with_its_loss_terms(compose: Any) -> None:
    found = stage_inputs(compose("experiment=digits", "hardware.device=cpu"))
    assert set(found["baselines"]["loss"]) == {"reconstruction"}
    assert set(found["evaluate"]["loss"]) == set()
