"""Small speech data, small models, and a run within a stage."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import execution_whitelist
from omegaconf import OmegaConf

from stagesweep.config import schema, trust
from stagesweep.run.context import Context
from stagesweep.store.store import Store
from stagesweep.systems.speech.data.dataset import Columns, Speech
from stagesweep.systems.speech.model.build import whisper_tiny
from stagesweep.systems.speech.model.mixture import MixtureWhisper
from stagesweep.systems.speech.simulate import simulated_speech
from stagesweep.tracking.tensorboard import TensorBoardWriter

WORDS = ("one", "two", "three", "four")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of features is shared by all tests of a session."""
    folder = tmp_path_factory.getbasetemp().parent / "speech_features"
    monkeypatch.setenv("STAGESWEEP_FEATURES", str(folder))


@pytest.fixture
def small() -> Speech:
    """48 simulated clips of four strata and 8 of typical speech."""
    return simulated_speech(
        speakers=3, clips=4, typical_speakers=5, typical_clips=4, words_each=1, seconds=0.36,
        bands=20, fractions=(0.4, 0.3, 0.3),
    )  # fmt: skip


@pytest.fixture
def tiny(small: Speech) -> MixtureWhisper:
    """A model of 20,000 parameters for `small`, with different experts."""
    torch.manual_seed(0)
    return tiny_for(small)


def tiny_for(data: Speech, **settings: Any) -> MixtureWhisper:
    given: dict[str, Any] = {"width": 16, "heads": 2, "hidden": 8, "rank": 2, "dropout": 0.0}
    model = whisper_tiny(data.spec, encoder_layers=1, decoder_layers=1, **(given | settings))
    for name, parameter in model.named_parameters():
        if ".B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def write_clips(tmp_path: Path) -> Callable[..., tuple[Path, Columns]]:
    """Write real audio files and their table; `change` may alter the table before."""
    import soundfile

    def write(
        change: Callable[[pd.DataFrame], Any] | None = None, **columns: Any
    ) -> tuple[Path, Columns]:
        random = np.random.default_rng(0)
        rows = []
        for number in range(24):
            name = f"{number}.wav"
            soundfile.write(tmp_path / name, random.normal(0, 0.1, 2000 + 40 * number), 8000)
            speaker = number % 8
            rows.append(
                {"path": name, "transcript": WORDS[number % 4], "speaker": f"s{speaker}",
                 "etiology": ("als", "stroke")[speaker % 2]}
            )  # fmt: skip
        table = pd.DataFrame(rows)
        if change is not None:
            table = table if (changed := change(table)) is None else changed
        table.to_csv(tmp_path / "table.csv", index=False)
        given = {"path": "path", "speaker": "speaker", "stratum": "etiology"} | columns
        return tmp_path / "table.csv", Columns("transcript", **given)

    return write


MakeSpeechRun = Callable[..., Context]


@pytest.fixture
def speech_run(tmp_path: Path, small: Speech) -> Iterator[MakeSpeechRun]:
    """A run in a stage called `it`, with given model and data."""

    def make(model: Any = None, data: Speech = small, number: int = 0, **stage: Any) -> Context:
        node = {"_target_": "stagesweep.stage.fit.Fit", **stage}
        tokens = "stagesweep.systems.speech.loss.TokenCrossEntropy"
        cfg = OmegaConf.create(
            {
                "seed": 0,
                "experiment": "test",
                "resume": "auto",
                "hardware": OmegaConf.structured(
                    schema.Hardware(device=schema.Device.cpu, workers=0)
                ),
                "model": {"_target_": "stagesweep.systems.speech.model.build.whisper_tiny"},
                "loss": {
                    "tokens": {"_target_": tokens},
                    "gate": {"_target_": "stagesweep.systems.speech.loss.GateTarget"},
                },
                "stage": {"it": node},
            }
        )
        board = TensorBoardWriter(tmp_path / "run" / "tensorboard")
        boards.callback(board.close)
        run = Context(cfg, tmp_path / "run", [], board)
        run.data = data
        run.model = tiny_for(data) if model is None else model
        run.stage, run.seed, run.stage_path = "it", 2**40, "test/it"
        run._entry = Store(tmp_path / "store").entry(f"{number:032x}")
        run._entry.begin(fresh=False)
        return run

    with execution_whitelist(trust.trusted()), ExitStack() as boards:
        yield make
