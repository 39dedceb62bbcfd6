"""`experiment=speech_quick` with the real command: a run, its reuse, kills and a resume."""

import json
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile

Command = Callable[..., "subprocess.CompletedProcess[str]"]
STAGES = [
    "base",
    "extract",
    "cluster",
    "gate",
    "experts",
    "asr",
    "baselines",
    "evaluate",
    "figures",
]
QUICK = ("experiment=speech_quick", "stage.extract.every=4", "hardware=cpu", "hardware.workers=0")


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Metrics that a resumed run must reproduce: all but the numbers of trained experts."""
    skipped = ("experts/trained", "experts/reused")
    return {name: value for name, value in found["metrics"].items() if name not in skipped}


@pytest.fixture(autouse=True)
def _own_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGESWEEP_FEATURES", str(tmp_path / "features"))


def test_a_run_its_reuse_and_a_killed_run(stagesweep: Command, warm: Any, tmp_path: Path) -> None:
    started = time.monotonic()
    stagesweep(*QUICK, "hydra.run.dir=first")
    took = time.monotonic() - started
    first = result(tmp_path / "first")
    assert [stage["name"] for stage in first["stages"]] == STAGES
    assert {stage["status"] for stage in first["stages"]} == {"ran"}
    figures = {path.stem for path in (tmp_path / "first").rglob("*.png")}
    assert {"clusters", "curves_asr", "expert_use", "wer"} <= figures
    stagesweep(*QUICK, "hydra.run.dir=second", "stage.asr.optimizer.lr=0.001")
    second = result(tmp_path / "second")
    status = [stage["status"] for stage in second["stages"]]
    assert status == ["reused"] * 5 + ["ran"] * 4
    environment = {"STAGESWEEP_STORE": str(tmp_path / "other")}
    moments = random.Random(0)
    for _ in range(3):
        process = warm.start([*QUICK, "hydra.run.dir=third"], tmp_path, environment)
        until = time.monotonic() + moments.uniform(0.1, 0.8) * took
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        process.kill()
        time.sleep(0.1)
    stagesweep(*QUICK, "hydra.run.dir=third", STAGESWEEP_STORE=environment["STAGESWEEP_STORE"])
    assert numbers(result(tmp_path / "third")) == numbers(first)


def write_clips(folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Write 24 clips of eight speakers in two strata, and their table."""
    noise = np.random.default_rng(0)
    for number in range(24):
        soundfile.write(folder / f"{number}.wav", noise.normal(0, 0.1, 2000), 8000)
    n = np.arange(24)
    table = pd.DataFrame(
        {"path": [f"{i}.wav" for i in n], "transcript": np.array(["one", "two"])[n % 2],
         "speaker": [f"s{i % 8}" for i in n], "etiology": np.array(["als", "stroke"])[n % 2],
         "part": np.array(["train", "val", "test"])[n % 8 % 3]}
    )  # fmt: skip
    change(table).to_csv(folder / "table.csv", index=False)


def damaged(folder: Path, kind: str) -> None:
    """Write clips with one fault."""
    change: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
        "empty": lambda t: t.assign(transcript=["..", *t["transcript"][1:]]),
        "both": lambda t: t.assign(part=["train", "val", "test"] * 8),
        "single": lambda t: t.assign(etiology=["als", *["stroke"] * 7] * 3),
    }
    write_clips(folder, change.get(kind, lambda t: t))
    match kind:
        case "missing":
            (folder / "3.wav").unlink()
        case "broken":
            (folder / "3.wav").write_bytes(b"RIFF")
        case "silent":
            soundfile.write(folder / "3.wav", np.zeros(2000), 8000)
        case "long":
            soundfile.write(folder / "3.wav", np.full(8000, 0.1), 8000)


CLIPS = ("experiment=speech_digits", "data=speech", "data.path=table.csv", "hardware=cpu",
         "data.columns.stratum=etiology", "hardware.workers=0", "data.bands=20", "data.seconds=0.4",
         "data.vocabulary=48", "data.normaliser=basic", "model.width=16", "stage.base.epochs=1",
         "stage.logistic.segments=1")  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        (
            "missing",
            "seed=0",
            "table.csv, line 5: 3.wav: the file does not exist; fix it, or leave",
        ),
        ("broken", "seed=0", "table.csv, line 5: 3.wav: not a readable audio file ("),
        (
            "silent",
            "seed=0",
            "table.csv, line 5: 3.wav: the clip is silent (peak amplitude 0); fix",
        ),
        ("long", "seed=0", "table.csv, line 5: a clip of 1.00 s is longer than the window of"),
        ("empty", "seed=0", "table.csv, line 2: the transcript is empty; fix it, or leave"),
        ("", "data.columns.path=wav", "no column 'wav' in table.csv; the nearest is 'path'"),
        ("", "data.on_error=ignore", "data.on_error=ignore: Speech expects Literal["),
        ("both", "data.columns.split=part", "table.csv: speaker 's0' is in the splits train and"),
        ("single", "seed=0", "stratum 'als' has one speaker, who cannot be in both train and"),
    ],
)
def test_unusable_clips_are_a_one_line_error_and_nothing_is_written(
    stagesweep: Command, tmp_path: Path, kind: str, override: str, message: str
) -> None:
    damaged(tmp_path, kind)
    process = stagesweep(*CLIPS, override, status=1)
    (line,) = [line for line in process.stderr.splitlines() if message in line]
    assert line.startswith("stagesweep: ")
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.rglob("manifest.json"))
    assert not list(tmp_path.rglob("weights.pt"))


def test_clips_are_left_out_only_on_request_and_replaced_files_are_detected(
    stagesweep: Command, tmp_path: Path
) -> None:
    damaged(tmp_path, "silent")
    short = ("~stage.cluster", "~stage.gate", "~stage.experts", "~stage.asr", "~stage.baselines")
    short += ("~stage.evaluate", "~stage.figures", "objective.metric=base/val_loss")
    words = (*CLIPS, *short, "data.on_error=skip")
    first = stagesweep(*words, "hydra.run.dir=first")
    assert "left out: table.csv, line 5: 3.wav: the clip is silent" in first.stdout + first.stderr
    assert {s["status"] for s in result(tmp_path / "first")["stages"]} == {"ran"}
    stagesweep(*words, "hydra.run.dir=second")
    assert {s["status"] for s in result(tmp_path / "second")["stages"]} == {"reused"}
    noise = np.random.default_rng(9)
    soundfile.write(tmp_path / "4.wav", noise.normal(0, 0.1, 2000), 8000)
    stagesweep(*words, "hydra.run.dir=third")
    third = result(tmp_path / "third")
    assert {s["status"] for s in third["stages"]} == {"ran"}


def test_a_tokenizer_that_does_not_fit_the_checkpoint_is_one_line(
    stagesweep: Command, tmp_path: Path
) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    write_clips(tmp_path, lambda table: table)
    sizes: dict[str, Any] = {"vocab_size": 9, "num_mel_bins": 20, "max_source_positions": 20}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "d_model": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = WhisperConfig(**sizes, **layers, **heads, **ids)
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "checkpoint")
    model = ("model=whisper", "model.path=checkpoint", "~stage.base", "~stage.logistic")
    words = [word for word in CLIPS if not word.startswith(("model.", "stage."))]
    process = stagesweep(*words, *model, status=1)
    message = "tokens, and model.path=checkpoint has 9; set data.pretrained=checkpoint"
    assert message in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.k=9", "model.k=9 must be between 1 and model.experts=4"),
        ("stage.extract.samples=2", "2 clips are too few for 4 clusters; extract more"),
        ("model.experts=9 stage.cluster.fewer=fail", "clusters for 9 experts with every min_clus"),
        ("stage.cluster.dim=0", "stage.cluster.dim=0: must be at least 1"),
        ("stage.cluster.fewer=stop", "stage.cluster.fewer=stop: Cluster expects Literal["),
        ("loss.balance.kind=none", "loss.balance.kind=none: Balance expects Literal["),
        ("data.seconds=0.1", "data.seconds=0.1 is too short for data.words_each=1"),
    ],
)
def test_errors_that_a_user_can_fix_are_one_line(
    stagesweep: Command, override: str, message: str
) -> None:
    process = stagesweep(*QUICK, *override.split(), "stage.base.epochs=1", status=1)
    assert message in process.stderr
    assert "Traceback" not in process.stderr
