"""What two and then three processes do for test_shard, each with a part of the model:
`python sharded.py <folder>` leaves what they found in `<folder>/<size>_<rank>.pt`.
"""

import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from conftest import Bench
from several import EVERYTHING, Sometimes, rows, start
from test_step import WEIGHTS, by_hand, make_batch, make_loss
from torch import nn

from stagesweep.base import signals
from stagesweep.base.errors import Interrupted, UserError
from stagesweep.config import schema
from stagesweep.core.fit import Loop
from stagesweep.core.step import WeightedLoss
from stagesweep.parallel import fsdp
from stagesweep.parallel.process_group import ALONE, Team, team

SETTINGS: dict[str, Any] = EVERYTHING | {
    "histogram_every": 2,
    "clip_norm": 0.5,
    "freeze": ["encoder.0.bias"],
    "optimizer": schema.Optimizer(
        lr=0.01, weight_decay=0.1, groups={"decoder*": schema.Group(lr=0.002)}
    ),
}
HARDWARE = {"parallel": schema.Parallel.shard, "micro_batch": 2}


def divided(names: list[str], model: nn.Module, micro_batch: int | None = None) -> WeightedLoss:
    """A loss whose model is divided."""
    shards = fsdp.Shards(team(), torch.device("cpu"))
    loss = make_loss(names, model=shards.divide(model), micro_batch=micro_batch)
    loss.team, loss.shards = team(), shards
    return loss


def gradients_of_each() -> dict[str, float]:
    """The largest difference from the undivided batch, by samples and micro-batch."""
    found = {}
    for n in (1, 20):
        names = list(WEIGHTS) if n > 1 else ["square", "masked"]
        batch = make_batch(n)
        reference = make_loss(names)
        expected, pairs = by_hand(reference, reference.model(batch), batch)
        for micro_batch in (None, 3):
            loss = divided(names, make_loss(names).model, micro_batch)
            values = loss.backward(batch, 0.0)
            grads = [fsdp.Shards.whole(p.grad).flatten() for p in loss.model.parameters()]
            differences = torch.cat(grads) - expected, (values - pairs) / pairs
            worst = max(difference.abs().max() for difference in differences)
            found[f"{n} samples, micro-batch {micro_batch}"] = worst.item()
    return found


def parameters_of_some() -> dict[str, Any]:
    """Which parameters get a gradient, where some are used by one process and some by none."""
    batch, there = make_batch(12), []
    for several in (False, True):
        torch.manual_seed(0)
        model = Sometimes().double()
        loss = divided(["square"], model) if several else make_loss(["square"], model=model)
        loss.backward(batch, 0.0)
        there.append([name for name, p in loss.model.named_parameters() if p.grad is not None])
    own = batch["x"][team().part(12), 0]
    return {"expected": there[0], "there": there[1], "on this process": bool((own > 1.5).any())}


def share(loop: Loop) -> float:
    """How much of all weights and moments this process holds."""
    moments = [s["exp_avg"] for s in loop.optimizer.state.values()]
    held = [sum(t.to_local().numel() for t in each) for each in (loop.parameters, moments)]
    return max(held) / sum(p.numel() for p in loop.parameters)


def fit(bench: Bench) -> dict[str, Any]:
    """A fit with everything in it, and the same of one process."""
    loop = bench.loop(name="sharded", team=team(), log_every=1, hardware=HARDWARE, **SETTINGS)
    found = {"metrics": loop.run(), "share": share(loop)}
    if team().main:
        alone = bench.loop(name="alone", log_every=1, **SETTINGS)
        found["expected metrics"] = alone.run()
        found["rows"], found["expected rows"] = rows(bench, "sharded"), rows(bench, "alone")
        found["weights"], found["expected weights"] = (
            each.given.state_dict() for each in (loop, alone)
        )
        found["files"] = sorted(path.name for path in loop.folder.iterdir())
        found["last"] = torch.load(loop.folder / "last.pt", weights_only=True)["model"]
    return found


def stopped(bench: Bench, folder: Path, hardware: dict[str, Any], team: Team) -> None:
    """A fit that is told to stop in its second epoch, whose checkpoints are in that folder."""
    loop = bench.loop(name=folder.name, team=team, hardware=hardware, keep_last=2, **SETTINGS)
    loop.folder = folder
    begin = loop.set_rates

    def tell(position: float) -> None:
        begin(position)
        if loop.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    loop.set_rates = tell  # type: ignore[method-assign]
    with signals.handled(), suppress(Interrupted):
        loop.run()


def gone_on(bench: Bench, folder: Path, hardware: dict[str, Any], team: Team) -> dict[str, Any]:
    """Where a fit goes on `from` with the checkpoints of that folder, and what it ends with."""
    loop = bench.loop(name="again", team=team, hardware=hardware, **SETTINGS)
    loop.folder = folder
    loop.restore()
    step = loop.step
    loop.start()
    return {"from": step, "metrics": loop.run()}


def full(bench: Bench) -> str:
    """What a process says whose device is full; the other would wait for it."""
    loop = bench.loop(name="full", hardware=HARDWARE, **SETTINGS)
    loss = divided(["square"], make_loss(["square"]).model, 4)
    loss.room = type(loop.room)(4, "training", loop.machine, fixed=True)

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    loss.attempt = no_room  # type: ignore[assignment, method-assign]
    try:
        loss.backward(make_batch(8), 0.0)
    except UserError as error:
        return str(error)
    return "nothing"


def of_two(bench: Bench, folder: Path) -> None:
    found = {"gradients": gradients_of_each(), "some": parameters_of_some(), "fit": fit(bench)}
    found["full"] = full(bench)
    stopped(bench, folder / "of two", HARDWARE, team())
    if team().main:
        found["kept"] = sorted(path.name for path in (folder / "of two").iterdir())
        stopped(bench, folder / "of one", {}, ALONE)
        shutil.copytree(folder / "of two", folder / "for one")
        found["one"] = gone_on(bench, folder / "for one", {}, ALONE)["metrics"]
        # The newest cannot be read by anyone, and another was never finished.
        shutil.copytree(folder / "of two", folder / "damaged")
        first, newest = sorted((folder / "damaged").glob("step_*"))
        for part in newest.glob("*.distcp"):
            os.truncate(part, part.stat().st_size // 2)
        shutil.copytree(first, folder / "damaged" / ".step_000000009.tmp")
    torch.save(found, folder / f"2_{team().rank}.pt")


def of_three(bench: Bench, folder: Path) -> None:
    names = ("of two", "of one", "damaged")
    found: dict[str, Any] = {n: gone_on(bench, folder / n, HARDWARE, team()) for n in names}
    if team().main:
        found["kept"] = sorted(path.name for path in (folder / "damaged").iterdir())
    torch.save(found, folder / f"3_{team().rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    fsdp.UNIT = 40  # so that layers of a small model are units
    for size, work in ((2, of_two), (3, of_three)):
        start(size, work, Path(sys.argv[1]))
