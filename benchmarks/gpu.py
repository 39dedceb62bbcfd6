"""What a GPU gets out of every experiment there is.

    make bench-gpu         (or: python -m benchmarks.gpu --data audiogram=mice.csv)

Three tables: samples a second of the first fit of every experiment in fp32, TF32, bf16, and bf16
compiled; a GPU that is really out of memory, and what became of the fit; data that lives on the
GPU against a DataLoader. An experiment that reads a file takes part when `--data` names it, with
the overrides that the file needs: `--data 'singlecell_full=cells.h5ad data.columns.label=type'`.
`--device cpu --small` is a smoke run: the same code, seconds, and no figure worth keeping.
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

from benchmarks.parts import Part, composed, fits, processor
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
# How many steps are timed, at least.
STEPS = 200


class Bench:
    """The benchmarks on one device; they print as they go, and `lines` is the page."""

    def __init__(self, device: Device, small: bool, data: dict[str, list[str]]) -> None:
        self.device, self.small, self.data = device, small, data
        self.lines: list[str] = []

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def machine(self, **given: Any) -> HardwareProfile:
        defaults = {"device": self.device, "precision": Precision.fp32, "tf32": False}
        return resolve(Hardware(**defaults | {"cudnn_benchmark": True, "workers": 0} | given))

    def variants(self) -> dict[str, dict[str, Any]]:
        """A CPU has no TF32, and compiling takes too long for a smoke run."""
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
            given = self.data.get(name, [])
            if self.small and name == "audiogram_simulated":
                given = ["data.animals=400"]
            cfg = composed(f"experiment={name}", *given)
            if OmegaConf.missing_keys(cfg):
                self.say(f"| {name} | needs `--data {name}=<file>` |" + " |" * len(variants))
                continue
            stage = fits(cfg)[0]
            found = [self.cell(cfg, stage, variant) for variant in variants.values()]
            batch = cfg.stage[stage].batch_size
            self.say(f"| {name}, {stage} | {batch} | {' | '.join(found)} |")

    def cell(self, cfg: DictConfig, stage: str, variant: dict[str, Any]) -> str:
        """A speed, or why there is none."""
        try:
            return f"{self.speed(Part(cfg, stage, self.machine(**variant))):,.0f}"
        except Exception as error:  # one that fails leaves the others to be measured
            return f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:60]}"

    def speed(self, part: Part, train: View | None = None) -> float:
        """Samples a second of training, the median of epochs after the first."""
        view = part.view("train") if train is None else train
        if self.small and train is None:
            view = tiled(part, 2 * part.settings.batch_size)
        each = -(-len(view) // part.settings.batch_size)
        epochs = 2 if self.small else 1 + max(3, -(-STEPS // each))
        part.settings = brief(part.settings, epochs)
        with part.loop(view) as loop:
            loop.run()
            rows = [row for row in read_rows(loop.rows.path) if row["kind"] == "epoch"]
        return statistics.median(row["samples_per_second"] for row in rows[1:])

    # ------------------------------------------------------------------ out of memory

    def out_of_memory(self) -> bool:
        """A fit on a device that has too little memory for its batch, against one that has not."""
        self.say(
            "\n## Out of memory, for real\n" if self.device is Device.cuda else "\n## Played\n"
        )
        losses, peaks, events = [], [], []
        for full in (False, True):
            part = Part(composed("experiment=digits"), "pretrain", self.machine())
            alone = {n: w for n, w in part.settings.loss.items() if per_sample(part.terms[n])}
            batch = 400 if self.small else 8192
            part.settings = replace(
                brief(part.settings, 2), loss=alone, batch_size=batch, augment=None
            )
            with (
                too_small(part, peaks[0] if full else None, batch),
                part.loop(tiled(part, batch)) as loop,
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
        """The same fit from data on the device, and read by a DataLoader."""
        self.say("\n## Where the data is\n")
        self.say("| data | samples a second |")
        self.say("|---|---|")
        workers = (0,) if self.small else (0, 4, 8)
        for number in (None, *workers):
            part = Part(
                composed("experiment=digits"), "pretrain", self.machine(workers=number or 0)
            )
            train = part.view("train")
            if number is None:
                self.say(f"| on the {self.device} | {self.speed(part, train):,.0f} |")
                continue
            read = LoaderView(Rows({n: c.cpu() for n, c in train.columns.items() if n != "index"}))
            read.prepare(part.machine.device, number)
            self.say(f"| DataLoader, {number} workers | {self.speed(part, read):,.0f} |")


class Rows:
    """The samples of a table, one by one."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def brief(settings: schema.Fit, epochs: int) -> schema.Fit:
    """The settings of a fit that is to be timed: no rule, no checkpoint, one evaluation."""
    return replace(
        settings, epochs=epochs, eval_every=epochs, early_stop={}, best={}, select="last",
        save_every=epochs, save_seconds=1e9, histogram_every=0,
    )  # fmt: skip


def tiled(part: Part, count: int) -> View:
    """So many samples of the training data, over and over."""
    train = part.view("train")
    rows = torch.arange(count, device=part.machine.device) % len(train)
    batch = next(iter(train.gather([rows])))
    columns = {name: column for name, column in batch.items() if name != "index"}
    view = View(columns)
    return view.prepare(part.machine.device, 0)


@contextmanager
def too_small(part: Part, peak: float | None, batch: int) -> Iterator[None]:
    """A GPU that gives torch 60 % of the memory, in MiB, that a fit has taken; on a CPU, a model
    that says so. `peak` None: all there is.
    """
    if peak is None:
        yield
    elif part.machine.device.type == "cuda":
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

        part.model.register_forward_pre_hook(refuse)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Print the tables and write them; status 1 without a GPU, or when a full one ends the fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="'EXPERIMENT=FILE [OVERRIDE …]'",
        help="the file that an experiment reads, and what else it needs to read it",
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
