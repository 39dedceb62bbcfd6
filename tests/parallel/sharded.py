"""The two, and then three, processes of test_fsdp, each with a part of the model:
`python sharded.py <folder>` saves their results in `<folder>/<size>_<rank>.pt`.
"""

import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fits import Bench
from several import EVERYTHING, Sometimes, rows, start
from steps import WEIGHTS, Step, by_hand, make_batch, make_step
from torch import nn

from stagesweep.base import signals
from stagesweep.base.errors import Interrupted, UserError
from stagesweep.config import schema
from stagesweep.core.fit import Loop
from stagesweep.parallel import fsdp
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup, current_group

SETTINGS: dict[str, Any] = EVERYTHING | {
    "histogram_every": 2,
    "clip_norm": 0.5,
    "freeze": ["encoder.0.bias"],
    "optimizer": schema.Optimizer(
        lr=0.01, weight_decay=0.1, groups={"decoder*": schema.Group(lr=0.002)}
    ),
}
HARDWARE = {"parallel": schema.Parallel.shard, "micro_batch": 2}


def sharded(names: list[str], model: nn.Module, micro_batch: int | None = None) -> Step:
    """A step of a sharded model."""
    sharding = fsdp.FSDP(current_group(), torch.device("cpu"))
    model = sharding.shard(model)
    return make_step(
        names, model=model, micro_batch=micro_batch, group=current_group(), fsdp=sharding
    )


def gradients_of_each() -> dict[str, float]:
    """The largest difference from the undivided batch, by samples and micro-batch."""
    found = {}
    for n in (1, 20):
        names = list(WEIGHTS) if n > 1 else ["square", "masked"]
        batch = make_batch(n)
        reference = make_step(names)
        expected, pairs = by_hand(reference, reference.model(batch), batch)
        for micro_batch in (None, 3):
            step = sharded(names, make_step(names).model, micro_batch)
            values = step.backward(batch, 0.0)
            grads = [fsdp.FSDP.full_tensor(p.grad).flatten() for p in step.model.parameters()]
            differences = torch.cat(grads) - expected, (values - pairs) / pairs
            worst = max(difference.abs().max() for difference in differences)
            found[f"{n} samples, micro-batch {micro_batch}"] = worst.item()
    return found


def parameters_of_some() -> dict[str, Any]:
    """Which parameters have a gradient if some are used by one process and some by none."""
    batch, there = make_batch(12), []
    for several in (False, True):
        torch.manual_seed(0)
        model = Sometimes().double()
        step = sharded(["square"], model) if several else make_step(["square"], model=model)
        step.backward(batch, 0.0)
        there.append([name for name, p in step.model.named_parameters() if p.grad is not None])
    own = batch["x"][current_group().local_slice(12), 0]
    return {"expected": there[0], "there": there[1], "on this process": bool((own > 1.5).any())}


def share(loop: Loop) -> float:
    """The share of all weights and moments that this process holds."""
    moments = [s["exp_avg"] for s in loop.optimizer.state.values()]
    held = [sum(t.to_local().numel() for t in each) for each in (loop.parameters, moments)]
    return max(held) / sum(p.numel() for p in loop.parameters)


def fit(bench: Bench) -> dict[str, Any]:
    """A fit with every kind of state, and the same fit in one process."""
    loop = bench.loop(
        name="sharded", group=current_group(), log_every=1, hardware=HARDWARE, **SETTINGS
    )
    found = {"metrics": loop.run(), "share": share(loop)}
    if current_group().is_main:
        alone = bench.loop(name="alone", log_every=1, **SETTINGS)
        found["expected metrics"] = alone.run()
        found["rows"], found["expected rows"] = rows(bench, "sharded"), rows(bench, "alone")
        found["weights"], found["expected weights"] = (
            each.given.state_dict() for each in (loop, alone)
        )
        found["files"] = sorted(path.name for path in loop.checkpoints.folder.iterdir())
        found["last"] = torch.load(loop.checkpoints.folder / "last.pt", weights_only=True)["model"]
    return found


def stopped(bench: Bench, folder: Path, hardware: dict[str, Any], group: ProcessGroup) -> None:
    """Stop a fit by a signal in its second epoch; its checkpoints are in the folder."""
    loop = bench.loop(name=folder.name, group=group, hardware=hardware, keep_last=2, **SETTINGS)
    loop.checkpoints.folder = folder
    begin = loop.set_learning_rates

    def signal_at(position: float) -> None:
        begin(position)
        if loop.state.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.set_learning_rates = signal_at  # type: ignore[method-assign]
    with signals.handled(), suppress(Interrupted):
        loop.run()


def gone_on(
    bench: Bench, folder: Path, hardware: dict[str, Any], group: ProcessGroup
) -> dict[str, Any]:
    """The step that a fit resumes `from` in the folder, and its final metrics."""
    loop = bench.loop(name="again", group=group, hardware=hardware, **SETTINGS)
    loop.checkpoints.folder = folder
    loop.checkpoints.restore()
    step = loop.state.step
    return {"from": step, "metrics": loop.run()}


def full() -> str:
    """The error of a process that runs out of memory; the other would wait for it."""
    step = sharded(["square"], make_step(["square"]).model, 4)

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    step.micro_batches.run = no_room  # type: ignore[assignment, method-assign]
    try:
        step.backward(make_batch(8), 0.0)
    except UserError as error:
        return str(error)
    return "nothing"


def of_two(bench: Bench, folder: Path) -> None:
    found = {"gradients": gradients_of_each(), "some": parameters_of_some(), "fit": fit(bench)}
    found["full"] = full()
    stopped(bench, folder / "of two", HARDWARE, current_group())
    if current_group().is_main:
        found["kept"] = sorted(path.name for path in (folder / "of two").iterdir())
        stopped(bench, folder / "of one", {}, SINGLE_PROCESS)
        shutil.copytree(folder / "of two", folder / "for one")
        found["one"] = gone_on(bench, folder / "for one", {}, SINGLE_PROCESS)["metrics"]
        # The newest cannot be read by anyone, and another was never finished.
        shutil.copytree(folder / "of two", folder / "damaged")
        first, newest = sorted((folder / "damaged").glob("step_*"))
        for part in newest.glob("*.distcp"):
            os.truncate(part, part.stat().st_size // 2)
        shutil.copytree(first, folder / "damaged" / ".step_000000009.tmp")
    torch.save(found, folder / f"2_{current_group().rank}.pt")


def of_three(bench: Bench, folder: Path) -> None:
    names = ("of two", "of one", "damaged")
    found: dict[str, Any] = {
        n: gone_on(bench, folder / n, HARDWARE, current_group()) for n in names
    }
    if current_group().is_main:
        found["kept"] = sorted(path.name for path in (folder / "damaged").iterdir())
    torch.save(found, folder / f"3_{current_group().rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    fsdp.UNIT = 40  # so that layers of a small model are units
    for size, work in ((2, of_two), (3, of_three)):
        start(size, work, Path(sys.argv[1]))
