"""Each expert is trained on its own clips, and stored by itself."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from stagesweep.config import schema
from stagesweep.systems.speech.data.dataset import Speech
from stagesweep.systems.speech.data.sampler import Subset
from stagesweep.systems.speech.model.mixture import is_expert
from stagesweep.systems.speech.stage.baselines import AdapterBaselines, TranscriptBaseline
from stagesweep.systems.speech.stage.cluster import Clustering, Projection
from stagesweep.systems.speech.stage.evaluate import Transcribe
from stagesweep.systems.speech.stage.experts import PretrainExperts

FIT: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 4,
    "loss": {"tokens": schema.Weight()},
    "optimizer": schema.Optimizer(lr=0.01, weight_decay=0.5),
}


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGESWEEP_STORE", str(tmp_path / "store"))


def clustered(run: Any, data: Speech, clusters: np.ndarray | None = None) -> np.ndarray:
    """Save clusters of training clips; all of val is in the first."""
    train, val = data.split("train"), data.split("val")
    own = np.arange(len(train)) % 4 if clusters is None else clusters
    rows = [*range(len(train)), *range(len(val))]
    split = ["train"] * len(train) + ["val"] * len(val)
    every = np.concatenate([own, np.zeros(len(val), int)])
    run.save("clusters.csv", pd.DataFrame({"split": split, "row": rows, "cluster": every}))
    projection = Projection(np.zeros(16), np.empty((0, 16)))
    found = Clustering(projection, np.zeros((1, 16)), np.zeros(1, int), 4, 1.0)
    run.save("clusters.npz", {"soft": np.eye(4)[every], **found.arrays()})
    return own


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_only_experts_with_clips_are_changed(small: Speech, speech_run: Any) -> None:
    run = speech_run()
    clustered(run, small, np.where(np.arange(len(small.split("train"))) < 12, 2, 1))
    before = weights(run.model)
    stage = PretrainExperts(**FIT)
    metrics = stage(run)
    assert set(metrics) == stage.metric_names({})
    assert (metrics["trained"], metrics["reused"]) == (2, 0)
    changed = {n for n, v in weights(run.model).items() if not torch.equal(v, before[n])}
    assert changed == {n for n in before if is_expert(n) and n.endswith((".1", ".2"))}
    assert len(run.history("it_1")) == len(run.history("it_2")) == 1


def test_only_experts_with_changed_clips_are_trained_again(small: Speech, speech_run: Any) -> None:
    torch.manual_seed(5)
    run = speech_run(number=1)
    clustered(run, small)
    start = weights(run.model)
    PretrainExperts(**FIT)(run)
    done = weights(run.model)
    again = speech_run(number=2)
    again.model.load_state_dict(start)
    own = clustered(again, small)
    metrics = PretrainExperts(**FIT)(again)
    assert (metrics["trained"], metrics["reused"]) == (0, 4)
    for name, value in weights(again.model).items():
        assert torch.equal(value, done[name]), name
    assert len(again.history("it_3")) == 1, "the history is reused, too"
    other = speech_run(number=3)
    other.model.load_state_dict(start)
    swapped = own.copy()
    swapped[np.flatnonzero(own == 3)[0]] = 2
    clustered(other, small, swapped)
    metrics = PretrainExperts(**FIT)(other)
    assert (metrics["trained"], metrics["reused"]) == (2, 2)
    slower = speech_run(number=4)
    slower.model.load_state_dict(start)
    clustered(slower, small)
    settings = FIT | {"optimizer": schema.Optimizer(lr=0.001)}
    assert PretrainExperts(**settings)(slower)["trained"] == 4


def test_clips_without_a_cluster_have_the_nearest(small: Speech, speech_run: Any) -> None:
    run = speech_run()
    clustered(run, small)
    table = run.load("clusters.csv")
    run.save("clusters.csv", table[table["split"] == "val"])
    metrics = PretrainExperts(**FIT, sampler=Subset(8))(run)
    assert (metrics["trained"], metrics["fewest_clips"]) == (1, 8), "there is only one centre"


def test_baselines_and_the_model_are_in_one_table(small: Speech, speech_run: Any) -> None:
    run = speech_run()
    run.build_model = lambda: run.model
    metrics = AdapterBaselines(**FIT)(run)
    assert set(metrics) == AdapterBaselines(**FIT).metric_names({})
    TranscriptBaseline()(run)
    found = Transcribe(resamples=20)(run)
    table = run.load("wer.csv")
    assert set(table["method"]) == {"routed", "shared", "dense", "none", "logistic"}
    assert set(table["split"]) == {"val", "test"}
    assert set(table["stratum"]) == {"all", "breathy", "muffled", "strained", "tremor"}
    assert (
        found["test_wer"]
        == table.set_index(["method", "split", "stratum"]).loc[("routed", "test", "all"), "wer"]
    )
    wanted = "test_cer test_wer_tremor test_shared_wer test_none_cer val_least_use"
    wanted += " test_routing_ari test_entropy_muffled test_expert_use_3"
    assert set(wanted.split()) <= set(found)
    hypotheses = run.load("hypotheses.csv")
    assert len(hypotheses) == 5 * (len(small.split("val")) + len(small.split("test")))
