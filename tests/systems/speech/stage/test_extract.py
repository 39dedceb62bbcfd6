"""Vectors equal those of the model, also after an interruption."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from stagesweep.systems.speech.data.dataset import Speech
from stagesweep.systems.speech.model.build import whisper_tiny
from stagesweep.systems.speech.model.mixture import MixtureWhisper
from stagesweep.systems.speech.stage.extract import Extract


def saved(run: Any, *names: str) -> list[np.ndarray]:
    return [np.load(run.find(name)) for name in names]


def test_vectors_are_those_of_the_model(
    tiny: MixtureWhisper, small: Speech, speech_run: Any
) -> None:
    run = speech_run(model=tiny)
    stage = Extract(states=True, batch_size=3, every=5)
    metrics = stage(run)
    pooled, states = saved(run, "pooled.npy", "states.npy")
    table = run.load("extracted.csv")
    assert set(metrics) == stage.metric_names()
    assert metrics["clips"] == len(table) == len(pooled) == len(states)
    tiny.eval()
    for split in ("train", "val"):
        (batch,) = small.split(split).batches(999)
        own = (table["split"] == split).to_numpy()
        with torch.no_grad():
            found = tiny.encode(batch)
        np.testing.assert_allclose(pooled[own], tiny.pool(found, batch["frames"]), atol=1e-5)
        np.testing.assert_allclose(states[own], found, atol=1e-2)
        assert states.dtype == np.float16
        assert table.loc[own, "id"].tolist() == small.ids(split).tolist()
    assert not list(run._entry.path.rglob("checkpoints/*"))


def test_an_interrupted_extraction_resumes_with_equal_results(
    tiny: MixtureWhisper, speech_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = speech_run(model=tiny, number=1)
    Extract(every=4, states=True)(whole)
    run = speech_run(model=tiny, number=2)
    encode, calls = Extract.encode, []

    def dying(self: Extract, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, *arguments)

    monkeypatch.setattr(Extract, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        Extract(every=4, states=True)(run)
    assert len(calls) == 4
    again = speech_run(model=tiny, number=2)
    assert any((again._entry.path / "checkpoints").rglob("*.*"))
    Extract(every=4, states=True)(again)
    total = -(-int((whole.load("extracted.csv")["split"] == "train").sum()) // 4)
    total += -(-int((whole.load("extracted.csv")["split"] == "val").sum()) // 4)
    assert len(calls) == 4 + total - 3, "finished chunks are not repeated"
    for name in ("pooled.npy", "states.npy", "frames.npy"):
        np.testing.assert_array_equal(*saved(whole, name), *saved(again, name))
    pd.testing.assert_frame_equal(whole.load("extracted.csv"), again.load("extracted.csv"))


def test_a_subset_of_train_and_all_of_val(
    tiny: MixtureWhisper, small: Speech, speech_run: Any
) -> None:
    run = speech_run(model=tiny)
    Extract(samples=8)(run)
    table = run.load("extracted.csv")
    train = table[table["split"] == "train"]
    assert train["stratum"].value_counts().tolist() == [2, 2, 2, 2]
    assert (table["split"] == "val").sum() == len(small.split("val"))


def test_unused_keys_of_the_model_do_not_affect_the_result(small: Speech, speech_run: Any) -> None:
    other: dict[str, Any] = {
        "experts": 2, "k": 1, "rank": 3, "alpha": 1.0, "dropout": 0.5, "hidden": 4,
        "curriculum": (0, 0), "temperature": (9, 9), "noise": 1.0,
    }  # fmt: skip
    assert set(other) == set(Extract().model_unused)
    found = []
    cases: tuple[dict[str, Any], ...] = ({}, other)
    for number, settings in enumerate(cases):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
        run = speech_run(model=whisper_tiny(small.spec, **sizes, **settings), number=number)
        Extract()(run)
        found += saved(run, "pooled.npy")
    np.testing.assert_array_equal(*found)
