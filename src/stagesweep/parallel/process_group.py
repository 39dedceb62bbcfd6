"""The processes that share a fit: each takes a part of every batch, and all do the same step.

What they tell each other goes through torch's process group: tensors of a GPU by NCCL, all else by
gloo. Alone, nothing is asked of it and nothing is copied.
"""

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagesweep.base.compat import default_store
from stagesweep.base.errors import Lost, UserError

Value = TypeVar("Value")

# The longest that one process may keep the others waiting within a fit.
PATIENCE = timedelta(hours=1)
# Seconds between two looks for the next fit.
LOOK = 0.02


@dataclass
class Team:
    """The processes of a run. All must call a method that talks to the others, in the same order;
    those that fail because another one has died raise `Lost`.
    """

    rank: int = 0
    size: int = 1
    # How many fits were handed out so far.
    orders: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """Which of `n` samples are this process's: parts differ by one at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def largest(self, n: int) -> int:
        """The size of the largest part of `n` samples."""
        return -(-n // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            with _lost():
                dist.all_reduce(value)
        return value

    def most(self, *values: int) -> list[int]:
        """The largest of each number over processes; no GPU is waited for."""
        if self.size == 1:
            return list(values)
        highest = torch.tensor(values, dtype=torch.int64)
        with _lost():
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        found: list[int] = highest.tolist()
        return found

    def gather(self, part: Tensor, n: int) -> Tensor:
        """The whole (n, …) of which this process has its `part`."""
        if self.size == 1:
            return part
        # Every process sends as much as the one that has most; NCCL knows no truth values.
        sent = part.new_zeros(self.largest(n), *part.shape[1:])
        sent[: len(part)] = part
        sent = sent.byte() if part.dtype is torch.bool else sent
        found = [torch.empty_like(sent) for _ in range(self.size)]
        with _lost():
            dist.all_gather(found, sent)
        parts = (Team(r, self.size).part(n) for r in range(self.size))
        whole = [all_[: own.stop - own.start] for all_, own in zip(found, parts, strict=True)]
        return torch.cat(whole).to(part.dtype)

    def share(self, value: Value) -> Value:
        """What the main process gives, on every process; tensors arrive on the CPU."""
        given: list[Any] = [value]
        if self.size > 1:
            with _lost():
                dist.broadcast_object_list(given, 0, device=torch.device("cpu"))
        shared: Value = given[0]
        return shared

    def start_sum(self, value: Tensor) -> Callable[[], object]:
        """Begin to add up over processes, in place; what is returned waits for the end of it."""
        with _lost():
            work = dist.all_reduce(value, async_op=True)
        wait: Callable[[], object] = _lost()(work.wait)
        return wait

    def average_buffers(self, *models: nn.Module | None) -> None:
        """Give all processes the mean of each statistic that a model keeps (those of batch norm).

        A running mean is linear in what it has seen, so that its mean over processes is that of
        their samples.
        """
        if self.size == 1:
            return
        for model in models:
            for buffer in model.buffers() if model is not None else ():
                if buffer.is_floating_point():
                    buffer.copy_(self.sum(buffer.clone()) / self.size)

    # ------------------------------------------------------------- who does what

    def hand_out(self, order: Any) -> None:
        """Give the other processes something to do; main process only."""
        if self.size > 1:
            packed = _packed(order)
            self._call("come")
            self.share(packed)

    def dismiss(self) -> None:
        """Tell the other processes that nothing more comes; main process only."""
        if self.size > 1:
            self._call("go")

    def next_order(self) -> Any:
        """Wait, however long, for what the main process gives this one to do; None at the end."""
        with _lost():
            while not default_store().check([self._bell]):
                time.sleep(LOOK)  # which a signal can interrupt
            called = default_store().get(self._bell)
        self.orders += 1
        return _unpacked(self.share(b"")) if called == b"come" else None

    # Not a collective operation: those who wait for one give up after a while.
    def _call(self, what: str) -> None:
        with _lost():
            default_store().set(self._bell, what)
        self.orders += 1

    @property
    def _bell(self) -> str:
        return f"stagesweep/{self.orders}"


ALONE = Team()
_team = ALONE


def team() -> Team:
    """The processes of this run: this one alone, unless it has joined others."""
    return _team


@contextmanager
def join() -> Iterator[Team]:
    """Be one of the processes that torchrun, or we ourselves, have started."""
    global _team
    if torch.cuda.is_available():
        # Whether there are enough is asked where it is known that they are used.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _lost():
        dist.init_process_group(backend, timeout=PATIENCE)
    _team = Team(dist.get_rank(), dist.get_world_size())
    try:
        yield _team
    finally:
        _team = ALONE
    dist.destroy_process_group()  # after an error the others might not come to it


def _packed(order: Any) -> bytes:
    """As torch saves it, so that its tensors can be put on another device."""
    stream = io.BytesIO()
    try:
        torch.save(order, stream)
    except Exception as error:
        raise UserError(
            f"cannot be sent to another process: {error}; make it a class or function of a module, "
            "or set hardware.devices=1"
        ) from error
    return stream.getvalue()


def _unpacked(content: bytes) -> Any:
    """Code comes with it, from the main process of this very run."""

    def place(storage: Any, where: str) -> Any:
        return storage.cuda() if where.startswith("cuda") else storage

    return torch.load(io.BytesIO(content), map_location=place, weights_only=False)


@contextmanager
def _lost() -> Iterator[None]:
    """What the group says when a process of it is gone."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise Lost(
            "another process of this run has ended, and says why if it could; the same command "
            f"goes on from the last checkpoint ({said})"
        ) from error
