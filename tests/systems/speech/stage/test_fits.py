"""Fits on extracted encoder states, and error rates during training."""

import pickle
from typing import Any

import pytest
import torch

from stagesweep.base.errors import UserError
from stagesweep.config import schema
from stagesweep.systems.speech.data.dataset import Speech
from stagesweep.systems.speech.model.mixture import MixtureWhisper
from stagesweep.systems.speech.stage import fits
from stagesweep.systems.speech.stage.evaluate import Transcribe
from stagesweep.systems.speech.stage.extract import Extract
from stagesweep.systems.speech.stage.fits import ErrorRates, split_view
from stagesweep.systems.speech.stage.joint import TrainJointly

FIT: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "loss": {"tokens": schema.Weight()},
    "optimizer": schema.Optimizer(lr=0.01),
    "train": ["gate.*", "*.A.*", "*.B.*"],
}


def test_states_replace_the_encoder(
    tiny: MixtureWhisper, small: Speech, speech_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = speech_run(model=tiny, number=1)
    Extract(states=True)(run)
    tiny.eval()
    for split in ("train", "val"):
        (plain,), (kept,) = small.split(split).batches(99), split_view(run, split).batches(99)
        assert set(plain) - set(kept) == {"mel"}
        assert all(torch.equal(kept[name], plain[name]) for name in set(plain) & set(kept))
        with torch.no_grad():
            expected, found = tiny(plain)["logits"], tiny(kept)["logits"]
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)
    digests = [view.samples.digest(0) for view in (small.split("val"), split_view(run, "val"))]
    assert digests[0] != digests[1], "experts of both have different fingerprints"

    def no(*arguments: Any) -> Any:
        raise AssertionError("the encoder was called")

    monkeypatch.setattr(tiny.whisper.model.encoder, "forward", no)
    assert TrainJointly(**FIT)(run)["epochs"] == 2


def test_clips_without_states_have_features(
    tiny: MixtureWhisper, small: Speech, speech_run: Any
) -> None:
    run = speech_run(model=tiny)
    assert "mel" in next(split_view(run, "val").batches(2)), "nothing was extracted"
    Extract(states=True, samples=8)(run)
    train = split_view(run, "train")
    assert "mel" in next(train.batches(2))
    table = run.load("extracted.csv")
    rows = torch.from_numpy(table.loc[table["split"] == "train", "row"].to_numpy(copy=True))
    batch = next(train.take(rows).batches(8))
    assert "states" in batch
    assert torch.equal(batch["clip"], train["clip"][rows])


def test_an_encoder_with_extracted_states_is_not_trained(
    tiny: MixtureWhisper, speech_run: Any
) -> None:
    run = speech_run(model=tiny)
    Extract(states=True)(run)
    with pytest.raises(
        UserError, match=r"an encoder cannot be trained on extracted states.*states=false"
    ):
        TrainJointly(**FIT | {"train": ["*"]})(run)


def test_error_rates_during_training_equal_those_of_the_evaluation(
    tiny: MixtureWhisper, small: Speech, speech_run: Any
) -> None:
    run = speech_run(model=tiny, number=1)
    start = {name: value.clone() for name, value in tiny.state_dict().items()}
    settings: dict[str, Any] = {
        "best": {"val_wer": schema.Mode.min},
        "metrics": {"rates": ErrorRates()},
    }
    stage = TrainJointly(**FIT, **settings)
    metrics = stage(run)
    assert not tiny.decode_in_evaluation
    assert len(run.history("it")["val_wer"].dropna()) == 2
    found = Transcribe(splits=["val"], resamples=2)(run)
    assert (metrics["val_wer"], metrics["val_cer"]) == (found["val_wer"], found["val_cer"])
    other = speech_run(model=tiny, number=2)
    tiny.load_state_dict(start)
    plain = TrainJointly(**FIT)(other)
    assert "val_wer" not in plain
    assert {name: metrics[name] for name in plain} == plain, "measuring does not change the fit"


def test_settings_with_error_rates_are_sent_and_compared(
    tiny: MixtureWhisper, speech_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = speech_run(model=tiny)
    settings = TrainJointly(**FIT, metrics={"rates": ErrorRates()})
    with fits.error_rates_enabled(run, tiny, settings):
        assert tiny.decode_in_evaluation
        sent = pickle.loads(pickle.dumps(settings))
    assert (
        repr(sent) == repr(settings) == repr(TrainJointly(**FIT, metrics={"rates": ErrorRates()}))
    )
    monkeypatch.setattr(type(run.profile), "shard", True, raising=False)
    monkeypatch.setattr(fits, "current_group", lambda: type("Group", (), {"world_size": 2}))
    object.__setattr__(run.profile, "shard", True)
    with (
        pytest.raises(UserError, match="a sharded model cannot be decoded during training"),
        fits.error_rates_enabled(run, tiny, settings),
    ):
        pass
