"""Fits of a small model, and fixtures that the tests of core, parallel and hardware share."""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import Batch, View
from stagesweep.config import schema
from stagesweep.core.fit import Loop
from stagesweep.hardware.profile import resolve
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup
from stagesweep.store.metric_log import MetricLog, NullMetricLog
from stagesweep.store.tensorboard import TensorBoardWriter

WIDTH, LATENT, SAMPLES = 6, 3, 44


class Tiny(nn.Module):
    """An autoencoder with noise on its latent, dropout, a norm and a counter."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 8), nn.SiLU(), nn.Dropout(dropout))
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.latent = nn.Linear(8, LATENT)
        self.decoder = nn.Linear(LATENT, WIDTH)

    def sample_noise(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"noise": torch.randn(n, LATENT, generator=generator, device=generator.device)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        mean = self.latent(self.norm(self.encoder(batch["x"])))
        noise = batch.get("noise")
        return {"mean": mean, "x": self.decoder(mean if noise is None else mean + 0.1 * noise)}


class Error(nn.Module):
    """Squared error, a mean over samples."""

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        total = (outputs["x"] - batch["x"]).square().sum()
        return total, total.new_tensor(len(batch["x"]))


class Masked(nn.Module):
    """Absolute error of what is observed, a mean over observed values."""

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        total = (outputs["x"] - batch["x"]).abs().masked_fill(~batch["x/mask"], 0).sum()
        return total, batch["x/mask"].sum().to(total)


class Spread(nn.Module):
    """Couples all samples: the log-sum-exp of every pair's negative distance."""

    whole_batch = ("mean",)

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        mean = outputs["mean"]
        far = (mean[:, None] - mean).square().sum(2)
        total = (-far + batch["weight"][:, None]).logsumexp(1).sum()
        return total, total.new_tensor(len(mean))


class Anchored(nn.Module):
    """Draws latents to where they were at the last look over the training set."""

    reports = ("moved",)
    anchors: Tensor

    def __init__(self, every: int = 2) -> None:
        super().__init__()
        self.every = every
        self.register_buffer("anchors", torch.zeros(SAMPLES, LATENT))

    def refresh(self, epoch: int, predict: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        if epoch % self.every:
            return {}
        before, self.anchors = self.anchors, predict()["mean"].to(self.anchors)
        return {"moved": (self.anchors - before).abs().mean().item()}

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        total = (outputs["mean"] - self.anchors[batch["index"]]).square().sum()
        return total, total.new_tensor(len(batch["index"]))


class Chance(nn.Module):
    """Adds a little of every global generator, so that a lost state shows."""

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        draw = torch.rand((), device=outputs["x"].device) + float(np.random.rand())
        return (outputs["x"] * draw).sum(), batch["x"].new_tensor(len(batch["x"]))


TERMS: dict[str, Callable[[], nn.Module]] = {
    "error": Error,
    "masked": Masked,
    "spread": Spread,
    "anchored": Anchored,
    "chance": Chance,
}


def columns(n: int = SAMPLES, seed: int = 0) -> dict[str, Tensor]:
    """A batch or split of `n` samples; samples 0 to 2 have nothing observed."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, WIDTH, generator=draw) > 0.4
    mask[:3] = False
    return {
        "x": torch.randn(n, WIDTH, generator=draw),
        "x/mask": mask,
        "weight": torch.rand(n, generator=draw),
        "index": torch.arange(n),
    }


SPEC = Spec(features={"x": Features(tuple(f"x{i}" for i in range(WIDTH)))})


class Bench:
    """Fits of the small model in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers: list[TensorBoardWriter] = []
        self.rows: list[MetricLog] = []

    def loop(
        self,
        *,
        model: nn.Module | None = None,
        terms: Mapping[str, nn.Module] | None = None,
        hardware: Mapping[str, Any] | None = None,
        name: str = "fit",
        train: View | None = None,
        val: View | None = None,
        group: ProcessGroup = SINGLE_PROCESS,
        **settings: Any,
    ) -> Loop:
        """A new fit in the folder `name`, of a model that is the same every time."""
        if model is None:
            torch.manual_seed(1)
            model = Tiny()
        if "loss" not in settings:
            settings["loss"] = {"error": schema.Weight()}
        if terms is None:
            terms = {term: TERMS[term]() for term in settings["loss"]}
        defaults = {"epochs": 3, "batch_size": 10, "save_seconds": 0, "histogram_every": 0}
        train = View(columns()) if train is None else train
        val = View(columns(30, seed=1)) if val is None else val
        profile = resolve(
            schema.Hardware(**{"device": schema.Device.cpu, "threads": 1, **(hardware or {})})
        )
        folder = self.folder / name
        writer = TensorBoardWriter(folder / f"tensorboard_{len(self.writers)}")
        self.writers.append(writer)
        self.rows.append(MetricLog(folder / "metrics.jsonl", writer, "fit"))
        return Loop(
            model=model.to(profile.device),
            terms={key: term.to(profile.device) for key, term in terms.items()},
            settings=schema.Fit(**{**defaults, **settings}),
            views={
                "train": train.prepare(profile.device, 0),
                "val": val.prepare(profile.device, 0),
            },
            spec=SPEC,
            hardware=profile,
            seed=7,
            folder=folder / "checkpoints",
            rows=self.rows[-1] if group.is_main else NullMetricLog("fit"),
            group=group,
        )

    def close(self) -> None:
        for log in self.rows:
            log.close()
        for writer in self.writers:
            writer.close()


@pytest.fixture(scope="session")
def open_bench() -> Callable[[Path], Bench]:
    """Fits of the small model in a folder of your choice."""
    return Bench


@pytest.fixture
def bench(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Bench]:
    """Fits of the small model; what they log is in `caplog`."""
    caplog.set_level(logging.INFO)
    threads = torch.get_num_threads()
    bench = Bench(tmp_path)
    yield bench
    bench.close()
    torch.set_num_threads(threads)


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """A batch of so many samples."""
    return columns


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """The small model, the same every time."""

    def make(**arguments: Any) -> nn.Module:
        torch.manual_seed(1)
        return Tiny(**arguments)

    return make


@pytest.fixture
def make_term() -> Callable[[str], nn.Module]:
    """A loss term by name."""
    return lambda name: TERMS[name]()
