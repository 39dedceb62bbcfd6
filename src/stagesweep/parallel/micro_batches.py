"""Forward, loss and backward of one effective batch, in micro-batches and over processes.

The gradient is the same for every micro-batch size and every number of processes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from stagesweep.base.seeding import set_torch_state, torch_state
from stagesweep.base.terms import whole_batch_outputs
from stagesweep.base.view import Batch
from stagesweep.hardware.out_of_memory import OutOfMemoryRetry, is_out_of_memory
from stagesweep.hardware.profile import HardwareProfile
from stagesweep.parallel.gradient_exchange import GradientExchange
from stagesweep.parallel.process_group import SINGLE_PROCESS, ProcessGroup

if TYPE_CHECKING:
    from stagesweep.parallel.fsdp import FSDP, ShardedGradients

Outputs = dict[str, Tensor]
Forward = Callable[[Batch], Outputs]
Terms = Mapping[str, nn.Module]
Value = TypeVar("Value")


class Loss(Protocol):
    """A weighted sum of loss terms; see `stagesweep.core.loss.WeightedLoss`."""

    @property
    def separable(self) -> Terms:
        """The terms that see one micro-batch at a time."""
        ...

    @property
    def whole_batch(self) -> Terms:
        """The terms that read outputs of the whole batch."""
        ...

    @property
    def terms(self) -> Terms:
        """Both, in this order."""
        ...

    def factors(self, position: float) -> Tensor:
        """The weight of each term `position` epochs into the fit: (terms,)."""
        ...

    def sums(self, terms: Terms, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Totals of the terms and the weights they are sums over, both (terms,)."""
        ...

    def combine(self, totals: Tensor, weights: Tensor, factors: Tensor) -> Tensor:
        """The sum of factor * total / weight."""
        ...


class MicroBatches:
    """Computes the gradient of an effective batch, split into micro-batches that fit in memory.

    Totals and weights of the terms are added up over micro-batches and processes and divided once.
    The gradient of a term that couples samples is first computed with respect to the outputs it
    reads, of the whole batch, and then replayed through each micro-batch (gradient cache, Gao et
    al. 2021, arXiv:2101.06983). What couples samples inside the model (batch norm) sees
    micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        scaler: torch.amp.GradScaler,
        hardware: HardwareProfile,
        group: ProcessGroup = SINGLE_PROCESS,
        fsdp: "FSDP | None" = None,
    ) -> None:
        self.model, self.scaler, self.group = model, scaler, group
        self.sharded = fsdp is not None
        self.retry = OutOfMemoryRetry(
            hardware.micro_batch, "training", hardware, can_retry=not self.sharded
        )
        self.exchange: GradientExchange | ShardedGradients | None = None
        if fsdp is not None:
            self.exchange = fsdp.gradients(model)
        elif group.world_size > 1:
            trained = [p for p in model.parameters() if p.requires_grad]
            self.exchange = GradientExchange(group, trained)

    @property
    def size(self) -> int | None:
        """The most samples in one forward pass; None: the whole batch."""
        return self.retry.size

    def backward(
        self,
        batch: Batch,
        forward: Forward,
        loss: Loss,
        factors: Tensor,
        samples: int | None = None,
    ) -> Tensor:
        """Add the gradient of the batch to ``.grad``; returns (total, weight) of terms: (terms, 2).

        Each process has the whole batch, or else its own part of the `samples`. When a device runs
        out of memory, the batch is repeated with half the micro-batch, which later batches keep.
        """
        n = samples or len(batch["index"])
        return self.retry.run(
            lambda size: self.run(batch, forward, loss, factors, n, size),
            self.group.largest_part(n),
            cleanup=self.model.zero_grad,
        )

    def run(
        self, batch: Batch, forward: Forward, loss: Loss, factors: Tensor, samples: int, size: int
    ) -> Tensor:
        """`backward` in micro-batches of `size`, without a retry."""
        if size < samples or self.group.world_size > 1:
            return _Accumulation(self, forward, loss, factors, samples, size).run(batch)
        totals, weights = loss.sums(loss.terms, forward(batch), batch)
        self.scaler.scale(loss.combine(totals, weights, factors)).backward()
        return torch.stack([totals.detach(), weights], 1)


class _Accumulation:
    """The gradient of one batch in two passes over micro-batches, and over processes.

    The first pass, without gradient, finds the weights of the terms and the outputs that
    whole-batch terms read. The second repeats each micro-batch with the same random numbers and
    adds its gradient. A process with one micro-batch keeps the graph of the first pass.
    """

    def __init__(
        self,
        parent: MicroBatches,
        forward: Forward,
        loss: Loss,
        factors: Tensor,
        samples: int,
        size: int,
    ) -> None:
        self.scaler, self.group, self.exchange = parent.scaler, parent.group, parent.exchange
        self.sharded = parent.sharded
        self.forward, self.loss, self.samples, self.size = forward, loss, samples, size
        counts = [len(loss.separable), len(loss.whole_batch)]
        self.factors, self.whole_batch_factors = factors.split(counts)
        # State of the random generators before each micro-batch, and the outputs of a single one.
        self.states: list[Any] = []
        self.outputs: Outputs | None = None

    def run(self, batch: Batch) -> Tensor:
        """Add the gradient of the batch to ``.grad``; returns (total, weight): (terms, 2)."""
        part = self.group.local_slice(self.samples)
        own = batch
        if len(batch["index"]) == self.samples:
            own = {name: column[part] for name, column in batch.items()}
        count = -(-self.group.largest_part(self.samples) // self.size)
        micro_batches = list(padded_micro_batches(own, batch, self.size, count))
        values, seen = self._together(lambda: self._first_pass(micro_batches))
        values = self.group.all_reduce(values)
        weights = values[:, 1]
        cached: dict[str, tuple[Tensor, ...]] = {}
        if self.loss.whole_batch:
            outputs = {
                name: self.group.all_gather(own, self.samples).requires_grad_()
                for name, own in seen.items()
            }
            whole = self.loss.sums(self.loss.whole_batch, outputs, batch)
            self.loss.combine(*whole, self.whole_batch_factors).backward()
            cached = {
                name: output.grad[part].split(self.size)
                for name, output in outputs.items()
                if output.grad is not None
            }
            values = torch.cat([values, torch.stack(whole, 1).detach()])
        self._together(lambda: self._second_pass(micro_batches, weights, cached))
        if self.exchange is not None:
            self.exchange.wait()
        return values

    def _together(self, work: Callable[[], Value]) -> Value:
        """Do this process's part; when one process runs out of memory, all raise the error."""
        if self.sharded:  # talks to the other processes while it works
            return work()
        error: RuntimeError | None = None
        try:
            done = work()
        except RuntimeError as raised:
            if not is_out_of_memory(raised):
                raise
            error = raised
        try:
            if any(self.group.all_reduce_max(error is not None)):
                raise error or torch.OutOfMemoryError("of another process")
        finally:
            error = None  # otherwise the error and this frame would keep each other alive
        return done

    def _first_pass(self, micro_batches: list[tuple[Batch, bool]]) -> tuple[Tensor, Outputs]:
        """(total, weight) of separable terms, and the outputs that whole-batch terms read."""
        sums = []
        coupled = self.loss.whole_batch.values()
        seen: dict[str, list[Tensor]] = {n: [] for t in coupled for n in whole_batch_outputs(t)}
        for micro_batch, counts in micro_batches:
            self.states.append(torch_state())
            with torch.set_grad_enabled(len(micro_batches) == 1):
                outputs = self.forward(micro_batch)
            with torch.no_grad():
                pair = self.loss.sums(self.loss.separable, outputs, micro_batch)
                sums.append(counts * torch.stack(pair, 1))
            for name, parts in seen.items():
                parts.append(outputs[name].detach()[: counts * len(micro_batch["index"])])
            self.outputs = outputs if len(micro_batches) == 1 else None
            del outputs  # before the next micro-batch needs the memory
        return torch.stack(sums).sum(0), {name: torch.cat(parts) for name, parts in seen.items()}

    def _second_pass(
        self,
        micro_batches: list[tuple[Batch, bool]],
        weights: Tensor,
        cached: Mapping[str, tuple[Tensor, ...]],
    ) -> None:
        """Add the gradient of each micro-batch; `cached` is that of the whole-batch terms."""
        with nullcontext() if self.exchange is None else self.exchange.accumulate():
            for number, (micro_batch, counts) in enumerate(micro_batches):
                if self.exchange is not None:
                    self.exchange.set_is_last_backward(number + 1 == len(micro_batches))
                own = {name: parts[number] for name, parts in cached.items()} if counts else {}
                self._add_gradient(number, micro_batch, counts, weights, own, cached)

    def _add_gradient(
        self,
        number: int,
        micro_batch: Batch,
        counts: bool,
        weights: Tensor,
        gradients: Mapping[str, Tensor],
        coupled: Collection[str],
    ) -> None:
        """Add the gradient of one micro-batch, and leave none of its tensors to the next.

        `gradients` are those of the `coupled` outputs, which whole-batch terms read.
        """
        outputs, self.outputs = self.outputs, None
        if outputs is None:
            set_torch_state(self.states[number])
            outputs = self.forward(micro_batch)
        totals, _ = self.loss.sums(self.loss.separable, outputs, micro_batch)
        losses = [self.loss.combine(totals, weights, self.factors)]
        if counts:
            losses += [(outputs[name] * part).sum() for name, part in gradients.items()]
        else:
            losses += [outputs[name].sum() for name in coupled]
        self.scaler.scale(counts * torch.stack(losses).sum()).backward()


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """Split a batch into micro-batches of at most `size` samples."""
    for start in range(0, len(batch["index"]), size):
        yield {name: column[start : start + size] for name, column in batch.items()}


def padded_micro_batches(
    own: Batch, batch: Batch, size: int, count: int
) -> Iterator[tuple[Batch, bool]]:
    """The `count` micro-batches of a process, and whether each counts.

    All processes have equally many, so that every parameter with a gradient has one everywhere.
    Where its own samples do not suffice, a process repeats the first of `batch` with weight zero.
    """
    micro_batches = list(split(own, size))
    yield from ((each, True) for each in micro_batches)
    for _ in range(count - len(micro_batches)):
        yield {name: column[:1] for name, column in batch.items()}, False
