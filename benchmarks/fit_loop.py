"""The fit loop against a bare hand-written loop and against Lightning, on the same work.

    make bench            (or: python -m benchmarks.fit_loop --rounds 13)

All three train the same model from the same start with the same loss, clipping and fused AdamW,
and compute the same validation loss after every epoch. They take turns in one process, so other
load of the machine affects all of them alike; the ratios are medians over the rounds.
"""

import argparse
import logging
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from stagesweep.base.spec import Spec
from stagesweep.base.view import Batch, Sampler, View
from stagesweep.config import schema
from stagesweep.core.fit import Loop
from stagesweep.hardware.profile import resolve
from stagesweep.loss.kl import KL
from stagesweep.loss.reconstruction import Reconstruction
from stagesweep.systems.audiogram.digits import Digits
from stagesweep.systems.audiogram.model.vae import ClusteringVAE
from stagesweep.tracking.metric_log import MetricLog
from stagesweep.tracking.tensorboard import TensorBoardWriter


class MLP(nn.Module):
    """A plain classifier of the pixels."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        (features,) = spec.features.values()
        self.layers = nn.Sequential(
            nn.Linear(len(features.names), 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, spec.labels["digit"]),
        )  # fmt: skip

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Class scores (B, 10)."""
        return {"scores": self.layers(batch["image"])}


class CrossEntropy(nn.Module):
    """Sum over samples."""

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the number of samples."""
        total = cross_entropy(outputs["scores"], batch["digit"], reduction="sum")
        return total, total.new_tensor(len(batch["digit"]))


@dataclass
class Case:
    """One model and its loss, on the digits."""

    name: str
    build: Callable[[Spec], nn.Module]
    terms: Mapping[str, nn.Module]
    batch_size: int = 256
    lr: float = 1e-3
    clip: float = 1.0

    def model(self, spec: Spec) -> nn.Module:
        """A new model with the same initial weights."""
        torch.manual_seed(0)
        return self.build(spec)


class Clock:
    """Times at which each epoch began, and at which the fit ended."""

    now = staticmethod(perf_counter)

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        """Record the begin of an epoch, or the end of the fit with all its files."""
        self.times.append(self.now())

    def seconds_per_epoch(self) -> float:
        """Seconds from the start of the second epoch (the first one warms up) to the end."""
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def noise(model: nn.Module, n: int, generator: torch.Generator) -> Batch:
    """The noise of the VAE for a batch; nothing for other models."""
    sample = getattr(model, "sample_noise", None)
    return sample(n, generator) if sample is not None else {}


def mean_loss(terms: Mapping[str, nn.Module], outputs: dict[str, Tensor], batch: Batch) -> Tensor:
    """The sum of the means of the terms."""
    pairs = [term(outputs, batch) for term in terms.values()]
    return sum((total / weight for total, weight in pairs), start=torch.zeros(()))


def bare(case: Case, data: Digits, epochs: int) -> float:
    """A minimal hand-written loop: training and the validation loss only."""
    clock, generator = Clock(), torch.Generator().manual_seed(0)
    train, val = (data.split(name).columns for name in ("train", "val"))
    model = case.model(data.spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.lr, fused=True)
    for _ in range(epochs):
        clock.tick()
        model.train()
        for rows in torch.randperm(len(train["index"])).split(case.batch_size):
            batch = {name: column[rows] for name, column in train.items()}
            batch |= noise(model, len(rows), generator)
            loss = mean_loss(case.terms, model(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            mean_loss(case.terms, model(val), val).item()
    clock.tick()
    return clock.seconds_per_epoch()


def ours(case: Case, data: Digits, epochs: int) -> float:
    """The project's loop with its defaults, early stopping and a best checkpoint."""
    clock = Clock()

    def ticking(view: View, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        clock.tick()
        return view.order(size, generator)

    sampler: Sampler = ticking
    settings = schema.Fit(
        epochs=epochs,
        batch_size=case.batch_size,
        loss={name: schema.Weight() for name in case.terms},
        optimizer=schema.Optimizer(lr=case.lr),
        clip_norm=case.clip,
        sampler=sampler,
        early_stop={"val_loss": schema.EarlyStop(patience=epochs)},
        best={"val_loss": schema.Mode.min},
    )
    with tempfile.TemporaryDirectory() as folder:
        board = TensorBoardWriter(Path(folder))
        rows = MetricLog(Path(folder, "metrics.jsonl"), board, "fit")
        profile = resolve(schema.Hardware(device=schema.Device.cpu))
        views = {name: data.split(name) for name in ("train", "val")}
        loop = Loop(
            case.model(data.spec), case.terms, settings, views, data.spec, profile, 0,
            Path(folder, "checkpoints"), rows,
        )  # fmt: skip
        loop.run()
        rows.close()
        board.close()
        clock.tick()
    return clock.seconds_per_epoch()


def with_lightning(case: Case, data: Digits, epochs: int) -> float:
    """Lightning with the usual loader, its default logger and checkpoints, and early stopping."""
    import lightning
    from lightning.pytorch.callbacks import Callback, EarlyStopping

    clock = Clock()
    names = list(data.split("train").columns)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model(data.spec)
            self.noise = torch.Generator().manual_seed(0)

        def step(self, batch: list[Tensor], name: str) -> Tensor:
            columns = dict(zip(names, batch, strict=True))
            if name == "train_loss":
                columns |= noise(self.model, len(batch[0]), self.noise)
            loss = mean_loss(case.terms, self.model(columns), columns)
            self.log(name, loss)
            return loss

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.step(batch, "train_loss")

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.step(batch, "val_loss")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=case.lr, fused=True)

    class Ticking(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            clock.tick()

    def loader(split: str, shuffle: bool, size: int) -> DataLoader[Any]:
        columns = data.split(split).columns.values()
        return DataLoader(TensorDataset(*columns), batch_size=size, shuffle=shuffle)

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            gradient_clip_val=case.clip,
            callbacks=[EarlyStopping("val_loss", patience=epochs), Ticking()],
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), loader("train", True, case.batch_size), loader("val", False, 1024))
        clock.tick()
    return clock.seconds_per_epoch()


CASES = [
    Case("VAE", ClusteringVAE, {"reconstruction": Reconstruction(), "kl": KL()}),
    Case("MLP", MLP, {"cross_entropy": CrossEntropy()}),
]


def compare(case: Case, data: Digits, epochs: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per epoch of each loop in each round."""
    loops = {"ours": ours, "bare": bare, "Lightning": with_lightning}
    for loop in loops.values():
        loop(case, data, 4)  # imports, allocator, caches
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            seconds[name].append(loop(case, data, epochs))
    return seconds


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument(
        "--cpu", action="store_true", help="CPU time of this process (for a busy machine)"
    )
    options = parser.parse_args()
    if options.cpu:
        Clock.now = staticmethod(process_time)
    warnings.simplefilter("ignore")  # Lightning advises on workers and logging intervals
    import lightning

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

    data = Digits()
    steps = -(-len(data.split("train")) // CASES[0].batch_size)
    print(
        f"{processor()}, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"Lightning {lightning.__version__}"
    )
    print(f"{options.rounds} rounds of {options.epochs} epochs, {steps} steps each, medians")
    print(f"{'':8}{'bare':>12}{'ours':>12}{'Lightning':>12}{'ours/bare':>12}{'Lightning/ours':>16}")
    for case in CASES:
        seconds = compare(case, data, options.epochs, options.rounds)
        shown = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        pairs = list(zip(seconds["ours"], seconds["bare"], seconds["Lightning"], strict=True))
        print(
            f"{case.name:8}{shown['bare']:>9.2f} ms{shown['ours']:>9.2f} ms"
            f"{shown['Lightning']:>9.2f} ms{statistics.median(o / b for o, b, _ in pairs):>12.2f}"
            f"{statistics.median(lightning / o for o, _, lightning in pairs):>16.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
