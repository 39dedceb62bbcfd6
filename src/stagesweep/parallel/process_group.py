"""The process group of a run: each process takes a part of every batch, and all do the same step.

Tensors of a GPU go through NCCL, all else through gloo. In a group of one process nothing is sent
and nothing is copied.
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

# How long a process waits for the others within a fit.
TIMEOUT = timedelta(hours=1)
# Seconds between two looks for the next task.
POLL_SECONDS = 0.02


@dataclass
class ProcessGroup:
    """The processes of a run.

    All must call a collective operation, in the same order; when another process has died, it
    raises `Lost`.
    """

    rank: int = 0
    world_size: int = 1
    # Number of tasks sent so far.
    tasks: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def local_slice(self, n: int) -> slice:
        """The part of `n` samples that belongs to this process; parts differ by one at most."""
        size = self.world_size
        return slice(n * self.rank // size, n * (self.rank + 1) // size)

    def largest_part(self, n: int) -> int:
        """The size of the largest part of `n` samples."""
        return -(-n // self.world_size)

    # ------------------------------------------------------------- collective operations

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world_size > 1:
            with _peer_errors():
                dist.all_reduce(value)
        return value

    def all_reduce_async(self, value: Tensor) -> Callable[[], object]:
        """Start the sum over processes, in place; returns the function that waits for it."""
        with _peer_errors():
            work = dist.all_reduce(value, async_op=True)
        wait: Callable[[], object] = _peer_errors()(work.wait)
        return wait

    def all_reduce_max(self, *values: int) -> list[int]:
        """The maximum of each number over processes; does not wait for a GPU."""
        if self.world_size == 1:
            return list(values)
        highest = torch.tensor(values, dtype=torch.int64)
        with _peer_errors():
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        found: list[int] = highest.tolist()
        return found

    def all_gather(self, part: Tensor, n: int) -> Tensor:
        """The whole tensor (n, …) of which this process has its `part`."""
        if self.world_size == 1:
            return part
        # Parts are padded to one size; NCCL cannot send booleans.
        sent = part.new_zeros(self.largest_part(n), *part.shape[1:])
        sent[: len(part)] = part
        sent = sent.byte() if part.dtype is torch.bool else sent
        found = [torch.empty_like(sent) for _ in range(self.world_size)]
        with _peer_errors():
            dist.all_gather(found, sent)
        ranks = range(self.world_size)
        slices = (ProcessGroup(rank, self.world_size).local_slice(n) for rank in ranks)
        parts = [padded[: s.stop - s.start] for padded, s in zip(found, slices, strict=True)]
        return torch.cat(parts).to(part.dtype)

    def broadcast(self, value: Value) -> Value:
        """The value of the main process, on every process; tensors arrive on the CPU."""
        values: list[Any] = [value]
        if self.world_size > 1:
            with _peer_errors():
                dist.broadcast_object_list(values, 0, device=torch.device("cpu"))
        received: Value = values[0]
        return received

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.broadcast(None)

    def average_buffers(self, *models: nn.Module | None) -> None:
        """Average the statistics of models (of batch norm) over processes.

        A running mean is linear in its samples, so the average is that of all samples.
        """
        if self.world_size == 1:
            return
        for model in models:
            for buffer in model.buffers() if model is not None else ():
                if buffer.is_floating_point():
                    buffer.copy_(self.all_reduce(buffer.clone()) / self.world_size)

    # ------------------------------------------------------------- tasks of the other processes

    def send_task(self, task: Any) -> None:
        """Send a task to the other processes; main process only."""
        if self.world_size > 1:
            packed = _pack(task)
            self._notify("task")
            self.broadcast(packed)

    def send_stop(self) -> None:
        """Tell the other processes that there are no more tasks; main process only."""
        if self.world_size > 1:
            self._notify("stop")

    def receive_task(self) -> Any:
        """Wait without a timeout for the next task of the main process; None when it stops."""
        with _peer_errors():
            while not default_store().check([self._key]):
                time.sleep(POLL_SECONDS)  # which a signal can interrupt
            notice = default_store().get(self._key)
        self.tasks += 1
        return _unpack(self.broadcast(b"")) if notice == b"task" else None

    # Not a collective operation, which would time out between two fits.
    def _notify(self, what: str) -> None:
        with _peer_errors():
            default_store().set(self._key, what)
        self.tasks += 1

    @property
    def _key(self) -> str:
        return f"stagesweep/{self.tasks}"


SINGLE_PROCESS = ProcessGroup()
_current = SINGLE_PROCESS


def current_group() -> ProcessGroup:
    """The process group of this run; a group of one unless `init_process_group` was entered."""
    return _current


@contextmanager
def init_process_group() -> Iterator[ProcessGroup]:
    """Join the group that torchrun, or this run itself, has started."""
    global _current
    if torch.cuda.is_available():
        # The hardware profile checks that there is a GPU for each process.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _peer_errors():
        dist.init_process_group(backend, timeout=TIMEOUT)
    _current = ProcessGroup(dist.get_rank(), dist.get_world_size())
    try:
        yield _current
    finally:
        _current = SINGLE_PROCESS
    dist.destroy_process_group()  # not after an error: the other processes might not get here


def _pack(task: Any) -> bytes:
    """Serialize with torch, so that tensors can be loaded on another device."""
    stream = io.BytesIO()
    try:
        torch.save(task, stream)
    except Exception as error:
        raise UserError(
            f"cannot be sent to another process: {error}; make it a class or function of a module, "
            "or set hardware.devices=1"
        ) from error
    return stream.getvalue()


def _unpack(content: bytes) -> Any:
    """Deserialize, code included: it comes from the main process of this run."""

    def place(storage: Any, where: str) -> Any:
        return storage.cuda() if where.startswith("cuda") else storage

    return torch.load(io.BytesIO(content), map_location=place, weights_only=False)


@contextmanager
def _peer_errors() -> Iterator[None]:
    """Raise `Lost` when another process of the group has died."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise Lost(
            "another process of this run has ended; see its error, then run the same command to "
            f"resume from the last checkpoint ({said})"
        ) from error
