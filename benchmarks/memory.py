"""Memory of the activations of one training step, for recipes that save memory and the plain one.

    python -m benchmarks.memory            (or with --device cuda, --small)

The large model of the audiogram recipe on a simulated cohort, a batch of 512 with augmented copies
and all loss terms. On the CPU, peak and total are those of torch's memory profiler (every
allocation and release of a tensor); on a GPU the peak is max_memory_allocated. Memory in use before
the step (model, gradients, batch) is subtracted. Recipes with the same model have the same loss.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.fit_stage import FitStage, composed, processor
from stagesweep.base.view import Batch
from stagesweep.config import schema
from stagesweep.core.loss import WeightedLoss
from stagesweep.core.predict import forward, to_device
from stagesweep.hardware.profile import HardwareProfile, resolve
from stagesweep.parallel.micro_batches import MicroBatches

PLAIN = "plain"
# Name, model, and settings of the profile.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("vae_large", {}),
    "activations recomputed": ("vae_large", {"activation_checkpointing": True}),
    "micro-batches of a half": ("vae_large", {"micro_batch": 2}),
    "both": ("vae_large", {"micro_batch": 2, "activation_checkpointing": True}),
    "both, micro-batches of an eighth": (
        "vae_large",
        {"micro_batch": 8, "activation_checkpointing": True},
    ),
    "memory recipe (smaller model, both)": (
        "vae_memory",
        {"micro_batch": 2, "activation_checkpointing": True},
    ),
}


class Step:
    """One step of the joint stage of the simulated audiograms, without the optimizer."""

    def __init__(self, model: str, profile: HardwareProfile, size: int, animals: int) -> None:
        cohort = [f"data.animals={animals}", f"data.genes={animals // 10}"]
        cfg = composed("experiment=audiogram_simulated", f"model={model}", *cohort)
        stage = FitStage(cfg, "joint", profile)
        scaler = torch.amp.GradScaler(enabled=False)
        self.loss = WeightedLoss(stage.terms, stage.settings.loss, profile.device)
        self.forward = partial(forward, stage.model, profile)
        self.micro_batches = MicroBatches(stage.model, scaler, profile)
        noise = torch.Generator(profile.device).manual_seed(0)
        batch = to_device(next(stage.view("train").batches(size)), profile.device)
        batch |= stage.model.sample_noise(size, noise)  # type: ignore[operator]
        self.batch: Batch = batch | stage.settings.augment(batch, stage.data.spec, noise)
        with torch.no_grad():
            outputs = stage.model(self.batch)
        for term in self.loss.terms.values():
            if hasattr(term, "refresh"):
                term.refresh(0, lambda: outputs)

    def __call__(self) -> float:
        """The loss of the batch at the current weights; its gradient is in ``.grad``."""
        factors = self.loss.factors(1e9)
        values = self.micro_batches.backward(self.batch, self.forward, self.loss, factors)
        return float((factors * values[:, 0] / values[:, 1].clamp(min=1e-12)).sum())


def peak_on_cpu(step: Callable[[], float]) -> float:
    """Peak bytes of the tensors that are allocated within a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (float(e["ts"]), int(e["args"]["Bytes"])) for e in events if e.get("name") == "[memory]"
    )
    held = most = 0
    for _, size in changes:
        held += size
        most = max(most, held)
    return most


def peak_on_gpu(step: Callable[[], float]) -> float:
    """Peak bytes of a step, without those in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(name: str, device: schema.Device, size: int, animals: int, rounds: int) -> list[float]:
    """Peak bytes, loss, and seconds of a step."""
    model, profile_says = RECIPES[name]
    settings = {**profile_says}
    if "micro_batch" in settings:
        settings["micro_batch"] = size // settings["micro_batch"]
    profile = resolve(
        schema.Hardware(device=device, precision=schema.Precision.fp32, tf32=False, **settings)
    )
    step = Step(model, profile, size, animals)
    loss = step()  # gradients are allocated, and kernels chosen
    peak = (peak_on_gpu if profile.device.type == "cuda" else peak_on_cpu)(step)
    seconds = []
    for _ in range(rounds):
        started = perf_counter()
        step()
        if profile.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(perf_counter() - started)
    return [peak, loss, min(seconds)]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; status 1 if a recipe changes the loss or saves no memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--small", action="store_true", help="a smoke run: seconds, small batch")
    options = parser.parse_args(arguments)
    size, animals, rounds = (64, 400, 1) if options.small else (512, 4000, 5)
    found: dict[str, list[float]] = {}
    print(f"{processor(torch.device(options.device))}, torch {torch.__version__}, batch {size}\n")
    print("| recipe | peak of a step, MiB | of plain | loss | difference | ms a step |")
    print("|---|---|---|---|---|---|")
    for name, (model, _) in RECIPES.items():
        found[name] = peak, loss, seconds = measure(
            name, schema.Device(options.device), size, animals, rounds
        )
        plain = found[PLAIN]
        same = model == RECIPES[PLAIN][0]
        differs = f"{abs(loss - plain[1]) / abs(plain[1]):.1e}" if same else "another model"
        print(
            f"| {name} | {peak / 2**20:.1f} | {peak / plain[0]:.0%} | {loss:.6f} | {differs} | "
            f"{1e3 * seconds:.0f} |",
            flush=True,
        )
    kept = all(
        abs(loss - found[PLAIN][1]) <= 1e-6 * abs(found[PLAIN][1]) and peak <= found[PLAIN][0]
        for name, (peak, loss, _) in found.items()
        if RECIPES[name][0] == RECIPES[PLAIN][0]
    )
    print("" if kept else "\nA recipe changes the loss by more than 1e-6, or saves no memory.")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
