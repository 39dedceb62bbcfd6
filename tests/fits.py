"""Fits of a small model, and fixtures that the tests of core, parallel and hardware share."""

import logging
import signal
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
from stagesweep.config.schema import Decay, EarlyStop, Mode, Schedule, Weight
from stagesweep.core import checkpoint
from stagesweep.core.fit import Loop
from stagesweep.hardware.profile import resolve
from stagesweep.hardware.throughput import SPEED
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup
from stagesweep.tracking.metric_log import MetricLog, NullMetricLog
from stagesweep.tracking.tensorboard import TensorBoardWriter, read_rows

Columns = Callable[..., Batch]
Make = Callable[..., nn.Module]
Augment = Callable[[Batch, Spec, torch.Generator], Batch]

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
    """Draws latents to their values at the last refresh over the training set."""

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
    """Adds random numbers of every global generator, so that a lost state is visible."""

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
        """A new fit in the folder `name`, of a model with the same initial weights."""
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


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two values are equal bit for bit."""
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def rows(loop: Loop, kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of a fit, without measurements of speed."""
    found = [
        {name: value for name, value in row.items() if name not in SPEED}
        for row in read_rows(loop.rows.path)
    ]
    return [row for row in found if kind in (None, row["kind"])]


def curve(loop: Loop, name: str) -> list[float]:
    return [row[name] for row in rows(loop, "epoch") if name in row]


class Scripted:
    """A metric with given values, one for each evaluation."""

    def __init__(self, name: str, values: list[float]) -> None:
        self.name, self.values = name, iter(values)

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        return {self.name: next(self.values)}


class At:
    """An augmentation that adds random columns, and does something at chosen steps."""

    def __init__(self, *steps: int, do: Callable[[], None] = lambda: None) -> None:
        self.steps, self.do, self.count = steps, do, 0

    def __call__(self, batch: Batch, spec: Spec, generator: torch.Generator) -> Batch:
        self.count += 1
        if self.count in self.steps:
            self.do()
        noise = torch.randn(batch["x"].shape, generator=generator, device=generator.device)
        return {"x": batch["x"] + 0.01 * noise}


class Everything:
    """A fit with every kind of state, run at once or in several parts."""

    EPOCHS, STEPS = 5, 25

    def __init__(self, bench: "Bench", tiny: Make) -> None:
        self.bench, self.tiny = bench, tiny

    def loop(self, name: str, augment: Augment | None = None, **settings: Any) -> Loop:
        loss = {
            "error": Weight(),
            "masked": Weight(0.5, ramp=3),
            "spread": Weight(0.1),
            "anchored": Weight(0.1),
            "chance": Weight(0.1),
        }
        defaults: dict[str, Any] = {
            "loss": loss,
            "epochs": self.EPOCHS,
            "eval_every": 2,
            "log_every": 3,
            "keep_last": 2,
            "ema": 0.9,
            "schedule": Schedule(decay=Decay.plateau, warmup=1.5, patience=1, factor=0.7),
            "best": {"val_loss": Mode.min, "train_loss": Mode.min},
            "early_stop": {"val_loss": EarlyStop(patience=9, min_delta=10.0)},
            "select": "train_loss",
        }
        return self.bench.loop(
            name=name,
            model=self.tiny(dropout=0.3, norm=True),
            augment=augment or At(),
            **(defaults | settings),
        )

    def outcome(self, loop: Loop, result: Mapping[str, float]) -> list[Any]:
        """All results of a fit."""
        best = {
            p.name: checkpoint.load(p)["model"] for p in loop.checkpoints.folder.glob("best_*.pt")
        }
        last = checkpoint.load(loop.checkpoints.folder / "last.pt")
        return [weights(loop.model), rows(loop), dict(result), best, last]


def identical(one: Any, other: Any) -> bool:
    """Whether nested values are equal bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(identical(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical, one, other))
    return bool(one == other) or (one != one and other != other)


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture(scope="session")
def open_bench() -> Callable[[Path], Bench]:
    """Fits of the small model in a given folder."""
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
    """A batch of `n` samples."""
    return columns


@pytest.fixture(scope="session")
def tiny() -> Callable[..., nn.Module]:
    """The small model with the same initial weights."""

    def make(**arguments: Any) -> nn.Module:
        torch.manual_seed(1)
        return Tiny(**arguments)

    return make


@pytest.fixture
def make_term() -> Callable[[str], nn.Module]:
    """A loss term by name."""
    return lambda name: TERMS[name]()
