"""A run without a config: real artifacts and predictions, toy data and model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import execution_whitelist
from omegaconf import OmegaConf
from sklearn.datasets import make_blobs
from torch import Tensor, nn

from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import View
from stagesweep.config import schema, trust
from stagesweep.model.cluster_centres import StudentTAssignment
from stagesweep.run.context import Context
from stagesweep.store.store import Store
from stagesweep.tracking.tensorboard import TensorBoardWriter


class Blobs:
    """Points in separate clouds; the cloud is the label `blob`, `site` is drawn at random.

    Points are given as z-scores of values around 50, of which every ninth is not observed.
    """

    def __init__(self, n: int = 240, width: int = 4, clouds: int = 4, **features: Any) -> None:
        points, blobs = make_blobs(n, width, centers=clouds, cluster_std=0.7, random_state=3)
        names = features.pop("names", tuple(f"x{number}" for number in range(width)))
        self.spec = Spec({"points": Features(names, **features)}, labels={"blob": 30, "site": 3})
        self.label_names = {"blob": [f"blob {number}" for number in range(30)]}
        self.columns = {
            "points": torch.tensor(points, dtype=torch.float32),
            "points/shift": torch.full((n, width), 50.0),
            "points/scale": torch.full((n, width), 2.0),
            "points/mask": (torch.arange(n * width) % 9 > 0).view(n, width),
            "blob": torch.tensor(blobs),
            "site": torch.tensor(np.random.default_rng(0).integers(3, size=n)),
        }

    def split(self, name: str) -> View:
        """Half of the points are train, a quarter each val and test."""
        n = len(self.columns["blob"])
        rows = {"train": slice(0, n // 2), "val": slice(n // 2, 3 * n // 4)}.get(
            name, slice(3 * n // 4, n)
        )
        return View({key: column[rows] for key, column in self.columns.items()})


class Mirror(nn.Module):
    """A model whose latent is its input times `scale`; decoded values are one unit too high."""

    def __init__(self, centres: Tensor, scale: float = 1.0) -> None:
        super().__init__()
        self.clusters = StudentTAssignment(*centres.shape)
        self.clusters.set_centres(centres)
        self.scale = scale

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        points = batch["points"]
        decoded = points * batch["points/scale"] + batch["points/shift"] + 1
        mean = points * self.scale
        return {
            "mean": mean,
            "logvar": torch.zeros_like(mean),
            "assignment": self.clusters(mean),
            "points": decoded,
        }


MakeRun = Callable[..., Context]


@pytest.fixture
def make_run(tmp_path: Path) -> Iterator[MakeRun]:
    """Makes a run inside a stage called `it`; `scale` goes to the model, the rest to `Blobs`."""

    def make(scale: float = 1.0, **blobs: Any) -> Context:
        cfg = OmegaConf.create(
            {
                "seed": 0,
                "hardware": OmegaConf.structured(schema.Hardware(device=schema.Device.cpu)),
                "loss": {
                    "reconstruction": {"_target_": "stagesweep.loss.reconstruction.Reconstruction"}
                },
            }
        )
        writer = TensorBoardWriter(tmp_path / "run" / "tensorboard")
        writers.callback(writer.close)
        run = Context(cfg, tmp_path / "run", [], writer)
        run.data = Blobs(**blobs)
        run.model = Mirror(blob_centres(run.data) * scale, scale)
        run.stage, run.seed = "it", 2**40
        run._entry = Store(tmp_path / "store").entry("0" * 32)
        run._entry.begin(fresh=True)
        return run

    with execution_whitelist(trust.trusted()), ExitStack() as writers:
        yield make


def blob_centres(data: Blobs) -> Tensor:
    """The mean of each cloud of the training split."""
    train = data.split("train")
    labels = train["blob"]
    return torch.stack([train["points"][labels == blob].mean(0) for blob in labels.unique()])
