"""Throughput and memory of every experiment on a GPU.

    make bench-gpu         (or: python -m benchmarks.gpu --data audiogram=mice.csv)

Three tables: samples a second of the first fit of every experiment in fp32, TF32, bf16, and bf16
compiled; a fit that runs out of GPU memory, and its result; data on the GPU against a DataLoader.
An experiment that reads a file is included when `--data` names the file, with the overrides that
it needs: `--data 'singlecell_full=cells.h5ad data.columns.label=type'`. `--device cpu --small` is a
smoke run: the same code in seconds, but its figures mean nothing.
"""

import argparse
import shlex
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from benchmarks.fit_stage import FitStage, composed, fits, processor
from stagesweep.base.terms import per_sample
from stagesweep.base.view import View
from stagesweep.config import register, schema
from stagesweep.config.schema import Device, Hardware, Precision
from stagesweep.data.loader import LoaderView
from stagesweep.hardware.profile import HardwareProfile, resolve
from stagesweep.tracking.tensorboard import read_rows

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": Precision.fp32, "tf32": False},
    "TF32": {"precision": Precision.fp32, "tf32": True},
    "bf16": {"precision": Precision.bf16, "tf32": True},
    "bf16, compiled": {"precision": Precision.bf16, "tf32": True, "compile": True},
}
# Overrides of a smoke run, for experiments that simulate more data than it needs.
SMALL = {
    "audiogram_simulated": ["data.animals=400"],
    "singlecell": ["data.cells=40", "data.genes=100"],
    "singlecell_cells": ["data.cells=40", "data.genes=100"],
    "singlecell_unlabelled": ["data.cells=40", "data.genes=100"],
    "speech": ["data.clips=2", "data.typical_clips=2"],
    "speech_quick": ["data.clips=2", "data.typical_clips=2"],
}
# Minimum number of timed steps.
STEPS = 200


class Bench:
    """The benchmarks on one device; each prints its lines and adds them to `lines`."""

    def __init__(self, device: Device, small: bool, data: dict[str, list[str]]) -> None:
        self.device, self.small, self.data = device, small, data
        self.lines: list[str] = []

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def profile(self, **given: Any) -> HardwareProfile:
        defaults = {"device": self.device, "precision": Precision.fp32, "tf32": False}
        return resolve(Hardware(**defaults | {"cudnn_benchmark": True, "workers": 0} | given))

    def variants(self) -> dict[str, dict[str, Any]]:
        """The variants to run: a CPU has no TF32, and compiling takes too long for a smoke run."""
        left_out = ({"TF32"} if self.device is Device.cpu else set()) | (
            {"bf16, compiled"} if self.small else set()
        )
        return {name: given for name, given in VARIANTS.items() if name not in left_out}

    # ------------------------------------------------------------------ throughput

    def throughput(self) -> None:
        """Samples a second of the first fit of every experiment."""
        names = sorted(file.stem for file in (register.folder() / "experiment").glob("*.yaml"))
        variants = self.variants()
        self.say("## Samples a second\n")
        self.say(f"| experiment | batch | {' | '.join(variants)} |")
        self.say("|---" * (2 + len(variants)) + "|")
        for name in names:
            given = SMALL.get(name, []) if self.small else self.data.get(name, [])
            cfg = composed(f"experiment={name}", *given)
            if OmegaConf.missing_keys(cfg):
                self.say(f"| {name} | needs `--data {name}=<file>` |" + " |" * len(variants))
                continue
            stage = fits(cfg)[0]
            if self.small:
                cfg = composed(f"experiment={name}", *given, f"stage.{stage}.batch_size=16")
            found = [self.cell(cfg, stage, variant) for variant in variants.values()]
            batch = cfg.stage[stage].batch_size
            self.say(f"| {name}, {stage} | {batch} | {' | '.join(found)} |")

    def cell(self, cfg: DictConfig, stage: str, variant: dict[str, Any]) -> str:
        """The speed of a variant, or its error."""
        try:
            return f"{self.speed(FitStage(cfg, stage, self.profile(**variant))):,.0f}"
        except Exception as error:  # the other variants are still measured
            return f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:60]}"

    def speed(self, stage: FitStage, train: View | None = None) -> float:
        """Samples a second of training, the median of epochs after the first."""
        view = stage.view("train") if train is None else train
        if self.small and train is None:
            view = tiled(stage, 2 * stage.settings.batch_size)
        each = -(-len(view) // stage.settings.batch_size)
        epochs = 2 if self.small else 1 + max(3, -(-STEPS // each))
        stage.settings = brief(stage.settings, epochs)
        with stage.loop(view) as loop:
            loop.run()
            rows = [row for row in read_rows(loop.rows.path) if row["kind"] == "epoch"]
        return statistics.median(row["samples_per_second"] for row in rows[1:])

    # ------------------------------------------------------------------ out of memory

    def out_of_memory(self) -> bool:
        """A fit on a device with too little memory for its batch, against one with enough."""
        real = self.device is Device.cuda
        self.say("\n## Out of memory\n" if real else "\n## Out of memory, simulated\n")
        losses, peaks, events = [], [], []
        for full in (False, True):
            stage = FitStage(composed("experiment=digits"), "pretrain", self.profile())
            alone = {n: w for n, w in stage.settings.loss.items() if per_sample(stage.terms[n])}
            batch = 400 if self.small else 8192
            stage.settings = replace(
                brief(stage.settings, 2), loss=alone, batch_size=batch, augment=None
            )
            with (
                too_small(stage, peaks[0] if full else None, batch),
                stage.loop(tiled(stage, batch)) as loop,
            ):
                losses.append(loop.run()["train_loss"])
                measured = loop.measured()
                events += measured["oom"]
                peaks.append(measured["speed"]["peak_mib"])
        same = abs(losses[1] - losses[0]) <= 1e-3 * abs(losses[0])
        halved = [str(event["to"]) for event in events if event["during"] == "training"]
        self.say(
            f"batch of {batch} in {peaks[0]:.0f} MiB; with 60 % of them: micro-batch {batch} → "
            f"{' → '.join(halved) or 'as it was'}, loss {losses[1]:.5f} against {losses[0]:.5f}: "
            f"{'survived' if same and halved else 'FAILED'}"
        )
        return same and bool(halved)

    # ------------------------------------------------------------------ data

    def data_paths(self) -> None:
        """The same fit with data on the device, and with data that a DataLoader reads."""
        self.say("\n## Data on the device and from a DataLoader\n")
        self.say("| data | samples a second |")
        self.say("|---|---|")
        workers = (0,) if self.small else (0, 4, 8)
        for number in (None, *workers):
            stage = FitStage(
                composed("experiment=digits"), "pretrain", self.profile(workers=number or 0)
            )
            train = stage.view("train")
            if number is None:
                self.say(f"| on the {self.device} | {self.speed(stage, train):,.0f} |")
                continue
            read = LoaderView(Rows({n: c.cpu() for n, c in train.columns.items() if n != "index"}))
            read.prepare(stage.profile.device, number)
            self.say(f"| DataLoader, {number} workers | {self.speed(stage, read):,.0f} |")


class Rows:
    """A data set whose items are single samples of a table."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def brief(settings: schema.Fit, epochs: int) -> schema.Fit:
    """The settings of a timed fit: no early stopping, no checkpoint, one evaluation."""
    return replace(
        settings, epochs=epochs, eval_every=epochs, early_stop={}, best={}, select="last",
        save_every=epochs, save_seconds=1e9, histogram_every=0,
    )  # fmt: skip


def tiled(stage: FitStage, count: int) -> View:
    """`count` samples of the training data, repeated as needed."""
    train = stage.view("train")
    rows = torch.arange(count, device=stage.profile.device) % len(train)
    batch = next(iter(train.gather([rows])))
    columns = {name: column for name, column in batch.items() if name != "index"}
    view = View(columns)
    return view.prepare(stage.profile.device, 0)


@contextmanager
def too_small(stage: FitStage, peak: float | None, batch: int) -> Iterator[None]:
    """Limit torch to 60 % of a fit's `peak` GPU memory in MiB; on a CPU the model raises the error.

    No limit when `peak` is None.
    """
    if peak is None:
        yield
    elif stage.profile.device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.6 * peak * 2**20 / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    else:

        def refuse(_: nn.Module, given: tuple[dict[str, Tensor]]) -> None:
            if len(given[0]["index"]) > 0.6 * batch:
                raise torch.OutOfMemoryError

        stage.model.register_forward_pre_hook(refuse)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Print and write the tables; status 1 without a GPU, or if the fit runs out of memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="'EXPERIMENT=FILE [OVERRIDE …]'",
        help="the file of an experiment, and the overrides that it needs",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/bench_gpu.md"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench-gpu: torch finds no GPU; --device cpu --small tries the benchmark itself")
        return 1
    data = {}
    for name, _, given in (each.partition("=") for each in options.data):
        path, *overrides = shlex.split(given)
        data[name] = [f"data.path={path}", *overrides]
    bench = Bench(Device(options.device), options.small, data)
    bench.say(f"{processor(torch.device(options.device))}, torch {torch.__version__}\n")
    bench.throughput()
    survived = bench.out_of_memory()
    bench.data_paths()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(bench.lines) + "\n")
    print(f"\nwritten to {options.output}")
    return 0 if survived else 1


if __name__ == "__main__":
    raise SystemExit(main())
