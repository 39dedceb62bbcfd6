"""The gradient of a batch over several processes: ours, torch's DistributedDataParallel, and each
part without communication, which is the lower limit.

    python -m benchmarks.processes          (one for each GPU; else --processes 2, on the CPU)

All three have the same model, loss and part of each batch, and take turns in the same processes; a
turn ends when the last process is done, and ratios are medians over the rounds. Ours also sums the
weights of the terms, so that parts may differ, notes which parameters have a gradient on any
process, and checks that all processes had enough memory.
"""

import argparse
import os
import socket
import statistics
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stagesweep.config import schema
from stagesweep.core.loss import WeightedLoss
from stagesweep.core.predict import forward
from stagesweep.hardware.profile import resolve
from stagesweep.loss.cross_entropy import CrossEntropy
from stagesweep.parallel.micro_batches import MicroBatches
from stagesweep.parallel.process_group import ProcessGroup, init_process_group

# Width, hidden layers, samples of a batch.
MODELS = {"small": (64, 2, 64), "narrow": (256, 3, 1024), "wide": (2048, 7, 256)}
CLASSES = 10

Batch = dict[str, Tensor]
Work = Callable[[], object]


class Classifier(nn.Module):
    """Linear layers of equal width."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)]
        self.layers = nn.Sequential(*blocks, nn.Linear(width, CLASSES))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return log-probabilities of the classes (B, 10)."""
        return {"classes": self.layers(batch["x"]).log_softmax(1)}


class Trial:
    """Three copies of a model, and one batch."""

    def __init__(self, name: str, device: torch.device, group: ProcessGroup) -> None:
        width, layers, samples = MODELS[name]
        torch.manual_seed(0)
        self.batch = {
            "x": torch.randn(samples, width, device=device),
            "label": torch.randint(CLASSES, (samples,), device=device),
            "index": torch.arange(samples, device=device),
        }
        self.own = {name: column[group.local_slice(samples)] for name, column in self.batch.items()}
        own, other, alone = (Classifier(width, layers).to(device) for _ in range(3))
        self.parameters = sum(p.numel() for p in own.parameters())
        self.term = CrossEntropy("label", output="classes")
        profile = resolve(schema.Hardware(device=schema.Device(device.type)))
        terms, weights = {"label": self.term}, {"label": schema.Weight()}
        self.model, self.forward = own, partial(forward, own, profile)
        self.loss = WeightedLoss(terms, weights, device)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.micro_batches = MicroBatches(own, scaler, profile, group)
        parallel = DistributedDataParallel(other, [device] if device.type == "cuda" else None)
        self.work: dict[str, Work] = {
            "torch DDP": lambda: self.by_hand(parallel),
            "ours": self.ours,
            "no exchange": lambda: self.by_hand(alone),
        }

    def ours(self) -> None:
        """Compute the gradient as the fit loop does, from the undivided batch."""
        self.model.zero_grad()
        factors = self.loss.factors(0.0)
        self.micro_batches.backward(self.batch, self.forward, self.loss, factors)

    def by_hand(self, model: nn.Module) -> None:
        """Compute the gradient with a plain forward and backward pass."""
        model.zero_grad()
        total, weight = self.term(model(self.own), self.own)
        (total / weight).backward()


def seconds(work: Work, group: ProcessGroup, device: torch.device) -> float:
    """Seconds until all processes are done, after all have started."""
    group.all_reduce_max(0)
    started = perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    group.all_reduce_max(0)
    return perf_counter() - started


def process(rank: int, size: int, port: int, rounds: int, names: list[str]) -> None:
    """Time the work in one process; the main process prints."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    with init_process_group() as group:
        gpus = torch.cuda.device_count() >= size
        device = torch.device("cuda", rank) if gpus else torch.device("cpu")
        for name in names:
            trial = Trial(name, device, group)
            times: dict[str, list[float]] = {kind: [] for kind in trial.work}
            for number in range(rounds + 3):
                for kind, work in trial.work.items():
                    taken = seconds(work, group, device)
                    if number >= 3:  # the first ones warm up
                        times[kind].append(taken)
            if group.is_main:
                print(f"{name}: {trial.parameters / 1e6:.2f} M parameters")
                for kind, own in times.items():
                    ratio = statistics.median(
                        a / b for a, b in zip(own, times["torch DDP"], strict=True)
                    )
                    median = statistics.median(own) * 1e3
                    print(f"  {kind:12}{median:9.2f} ms  {ratio:6.2f} x DDP", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Start the processes, and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpus = torch.cuda.device_count()
    parser.add_argument("--processes", type=int, default=max(2, gpus))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--small", action="store_true", help="a smoke run of seconds")
    options = parser.parse_args(arguments)
    device = torch.cuda.get_device_name() if gpus >= options.processes else "CPU (gloo)"
    print(f"{options.processes} processes, {device}, torch {torch.__version__}")
    names = ["small"] if options.small else ["narrow", "wide"]
    rounds = 3 if options.small else options.rounds
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = (options.processes, port, rounds, names)
    torch.multiprocessing.spawn(process, given, options.processes)


if __name__ == "__main__":
    main()
