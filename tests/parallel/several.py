"""The three processes of test_process_group: `python several.py <folder>` saves the results of each
process in `<folder>/<rank>.pt`.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fits import Bench, columns
from steps import (
    WEIGHTS,
    Model,
    Small,
    SmallAtTheEnd,
    by_hand,
    make_batch,
    make_step,
)
from steps import gradients as gradients_of
from torch import Tensor, nn

from stagesweep.base.errors import Interrupted, Lost
from stagesweep.base.view import Batch, View
from stagesweep.config import schema
from stagesweep.core.predict import predict
from stagesweep.parallel import gradient_exchange
from stagesweep.parallel.process_group import ProcessGroup, current_group, init_process_group

Work = Callable[[Bench, Path], None]

SIZE = 3
# Fewer samples than processes; parts that differ; equal parts.
SAMPLES, MICRO = (1, 2, 20, 24), (None, 1, 2, 4, 8)
EVERYTHING: dict[str, Any] = {
    "epochs": 3,
    "loss": {
        "error": schema.Weight(),
        "masked": schema.Weight(0.5, ramp=2.0),
        "spread": schema.Weight(0.1),
        "anchored": schema.Weight(0.1),
    },
    "metrics": {"mean": lambda arrays: {"seen": len(arrays["mean"]), "mean": arrays["mean"].sum()}},
    "best": {"val_mean": schema.Mode.max},
    "select": "val_mean",
    "ema": 0.9,
    "schedule": schema.Schedule(decay=schema.Decay.plateau, warmup=0.5, patience=1),
}
# Neither is whole-batch, so that each process reads its own samples alone.
OWN_PARTS: dict[str, Any] = {"epochs": 2, "loss": {"error": schema.Weight()}, "batch_size": 15}


class Sometimes(Model):
    """A model with an unused layer, and a layer for samples whose first feature is large."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.unused, self.rare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        outputs = super().forward(batch)
        if (chosen := batch["x"][:, 0] > 1.5).any():
            outputs["mean"] = outputs["mean"] + chosen[:, None] * self.rare(outputs["mean"])
        return outputs


def gradients_of_each() -> dict[str, float]:
    """The largest difference from the undivided batch, by samples and micro-batch."""
    found = {}
    for n in SAMPLES:
        names = WEIGHTS if n > 1 else ["square", "masked"]
        batch = make_batch(n)
        reference = make_step(names)
        expected, pairs = by_hand(reference, reference.model(batch), batch)
        for micro_batch in MICRO:
            step = make_step(names, micro_batch=micro_batch, group=current_group())
            values = step.backward(batch, 0.0)
            differences = gradients_of(step.model) - expected, (values - pairs) / pairs
            worst = max(difference.abs().max() for difference in differences)
            found[f"{n} samples, micro-batch {micro_batch}"] = worst.item()
    return found


def own_part_alone() -> float:
    """The same where each process has its own samples only."""
    batch, names = make_batch(20), ["square", "masked"]
    reference = make_step(names)
    expected, _ = by_hand(reference, reference.model(batch), batch)
    step = make_step(names, micro_batch=4, group=current_group())
    part = {name: column[current_group().local_slice(20)] for name, column in batch.items()}
    step.backward(part, 0.0, 20)
    return float((gradients_of(step.model) - expected).abs().max())


def parameters_of_some() -> dict[str, Any]:
    """Which parameters get a gradient, and how far it is from that of the undivided batch."""
    batch = make_batch(12)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Sometimes().double())
    alone = make_step(["square"], model=models[0])
    several = make_step(["square"], model=models[1], group=current_group())
    alone.backward(batch, 0.0)
    several.backward(batch, 0.0)
    own = batch["x"][current_group().local_slice(12), 0]
    return {
        "on this process": bool((own > 1.5).any()),
        "there": [name for name, p in models[1].named_parameters() if p.grad is not None],
        "expected": [name for name, p in models[0].named_parameters() if p.grad is not None],
        "worst": float((gradients_of(models[0]) - gradients_of(models[1])).abs().max()),
    }


def out_of_memory_on_one(kind: type[Small]) -> dict[str, Any]:
    """Out-of-memory on one process, whose GPU has memory for two samples."""
    batch = make_batch(24)
    torch.manual_seed(0)
    small = kind(2 if current_group().rank == 1 else 100).double()
    step = make_step(WEIGHTS, model=small, group=current_group())
    step.backward(batch, 0.0)
    reference = make_step(WEIGHTS)
    expected, _ = by_hand(reference, reference.model(batch), batch)
    worst = (gradients_of(step.model) - expected).abs().max()
    return {"micro_batch": step.micro_batches.size, "worst": worst.item()}


@dataclass
class Watched(ProcessGroup):
    """Records the number of gradients at the start of each sum."""

    sums: gradient_exchange.GradientExchange | None = None
    there: list[int] = field(default_factory=list)

    def all_reduce_async(self, value: Tensor) -> Callable[[], object]:
        assert self.sums is not None
        self.there.append(len(self.sums.reached))
        return super().all_reduce_async(value)


def overlap() -> list[int]:
    """Number of gradients when each bucket was sent, and in the end."""
    watched = Watched(current_group().rank, current_group().world_size)
    step = make_step(WEIGHTS, group=watched)
    watched.sums = step.micro_batches.exchange
    step.backward(make_batch(24), 0.0)
    return [*watched.there, sum(p.grad is not None for p in step.model.parameters())]


def rows(bench: Bench, name: str) -> list[dict[str, Any]]:
    lines = (bench.folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def fits(bench: Bench) -> dict[str, Any]:
    """Fits with every kind of state, in one process and in all."""
    found: dict[str, Any] = {}
    for name, settings in {"everything": EVERYTHING, "own parts": OWN_PARTS}.items():
        loop = bench.loop(name=name, group=current_group(), log_every=1, **settings)
        found[name] = {"undivided": loop.batches.undivided, "metrics": loop.run()}
        weights = torch.cat([p.detach().flatten() for p in loop.parameters])
        found[name]["same weights"] = bool(
            (current_group().all_gather(weights[None], SIZE) == weights).all()
        )
        if current_group().is_main:
            found[name]["rows"] = rows(bench, name)
            alone = bench.loop(name=f"{name} alone", log_every=1, **settings)
            found[name]["expected metrics"] = alone.run()
            found[name]["expected rows"] = rows(bench, f"{name} alone")
    return found


def stopped(bench: Bench) -> dict[str, Any]:
    """A signal to one process stops the fit; then the main process resumes it alone."""
    from stagesweep.base import signals

    loop = bench.loop(name="stopped", group=current_group(), **EVERYTHING)
    begin = loop.set_learning_rates

    def signal_at(position: float) -> None:
        begin(position)
        if loop.state.step == 6 and current_group().rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.set_learning_rates = signal_at  # type: ignore[method-assign]
    said = ""
    with signals.handled():
        try:
            loop.run()
        except Interrupted as error:
            said = str(error)
    found = {"said": said, "step": loop.state.step}
    if current_group().is_main:
        found["metrics"] = bench.loop(name="stopped", **EVERYTHING).run()
    return found


def statistics(bench: Bench) -> dict[str, Any]:
    """Batch norm statistics after an epoch in which each process had its own samples."""
    torch.manual_seed(1)
    from fits import Tiny

    loop = bench.loop(
        name="norm", group=current_group(), model=Tiny(norm=True), epochs=1, batch_size=12
    )
    loop.run()
    mean = loop.model.norm.running_mean
    same = (current_group().all_gather(mean[None], SIZE) == mean).all()
    return {"same": bool(same), "norm": mean.norm().item()}


def whole_split(bench: Bench) -> dict[str, bool]:
    """Outputs of a split of 44 samples, and of one with fewer samples than processes."""
    found = {}
    for n in (44, 2):
        loop = bench.loop(name=f"split {n}")
        view = View(columns(n))
        names = ["mean", "index", "x/mask"]
        alone = predict(loop.model, view, names, loop.hardware, 5)
        several = predict(loop.model, view, names, loop.hardware, 5, group=current_group())
        found[str(n)] = all(
            several[k].dtype is alone[k].dtype and torch.allclose(several[k], alone[k])
            for k in names
        )
    return found


def one_gone() -> str:
    """The last process exits without an error."""
    if current_group().rank == SIZE - 1:
        os._exit(0)
    try:
        current_group().all_reduce(torch.ones(1))
    except Lost as error:
        return str(error)
    return "nothing"


def of_three(bench: Bench, folder: Path) -> None:
    gradient_exchange.BUCKET = 100  # so that a small model has several buckets
    found: dict[str, Any] = {
        "gradients": gradients_of_each(),
        "own part": own_part_alone(),
        "some": parameters_of_some(),
        "memory": {kind.__name__: out_of_memory_on_one(kind) for kind in (Small, SmallAtTheEnd)},
        "overlap": overlap(),
        "fits": fits(bench),
        "stopped": stopped(bench),
        "norm": statistics(bench),
        "split": whole_split(bench),
    }
    torch.save(found, folder / f"{current_group().rank}.pt")
    found["gone"] = one_gone()
    torch.save(found, folder / f"{current_group().rank}.pt")


def process(rank: int, size: int, work: Work, folder: Path, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    bench = Bench(folder / f"rank {rank} of {size}")
    with init_process_group():
        work(bench, folder)
        bench.close()
        os._exit(0)  # a group that has lost a process cannot be closed


def start(size: int, work: Work, folder: Path) -> None:
    """Run `work` in `size` processes; exit if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    given = [(rank, size, work, folder, port) for rank in range(size)]
    processes = [context.Process(target=process, args=each) for each in given]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    if failed := [each.exitcode for each in processes if each.exitcode]:
        sys.exit(max(map(abs, failed)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    start(SIZE, of_three, Path(sys.argv[1]))
