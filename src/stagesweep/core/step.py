"""The loss of one effective batch and its gradient, the same for any micro-batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from stagesweep.base.terms import per_sample, reads
from stagesweep.base.view import Batch
from stagesweep.config import schema
from stagesweep.core.seeding import set_torch_state, torch_state
from stagesweep.hardware.out_of_memory import Room, out_of_memory
from stagesweep.hardware.profile import Machine
from stagesweep.parallel.gradient_exchange import Gradients
from stagesweep.parallel.process_group import ALONE, Team

if TYPE_CHECKING:
    from stagesweep.parallel.fsdp import Shards

Terms = Mapping[str, nn.Module]
Value = TypeVar("Value")


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch cut into micro-batches of at most `size` samples."""
    for start in range(0, len(batch["index"]), size):
        yield {name: column[start : start + size] for name, column in batch.items()}


def add_up(terms: Terms, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """The totals of the terms and the weights they are sums over, both (terms,)."""
    with full_precision():
        values = [term(outputs, batch) for term in terms.values()]
    if not values:
        none = batch["index"].new_zeros(0).float()
        return none, none
    totals, weights = zip(*values, strict=True)
    return torch.stack(totals), torch.stack(weights).detach()


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 without TF32, in which the model's own matrix products may be: the exponentials and
    logarithms of a loss make large errors of small ones.
    """
    models = torch.get_float32_matmul_precision()
    if models == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(models)


class WeightedLoss:
    """A weighted sum of terms, each a mean over what the term says it is a mean over.

    Every term gives (total, weight) of a micro-batch. Totals and weights are added up over the
    effective batch and divided once, so the gradient does not depend on the micro-batch, nor on the
    `team` of processes that the batch is divided among. A term that couples samples
    (``whole_batch`` names the outputs it reads) sees the undivided batch: its gradient with respect
    to those outputs is computed first and replayed through each micro-batch (gradient cache, Gao et
    al. 2021, arXiv:2101.06983). What couples samples inside the model (batch norm) sees
    micro-batches, as everywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Terms,
        weights: Mapping[str, schema.Weight],
        machine: Machine,
        scaler: torch.amp.GradScaler,
        team: Team = ALONE,
        shards: "Shards | None" = None,
    ) -> None:
        used = {name: terms[name] for name, weight in weights.items() if weight.weight > 0}
        self.whole = {name: term for name, term in used.items() if reads(term)}
        self.single = {n: t for n, t in used.items() if n not in self.whole}
        # Rows of (total, weight) are in this order.
        self.terms = self.single | self.whole
        self.weights = {name: weights[name] for name in self.terms}
        self.model: nn.Module = torch.compile(model) if machine.compile else model  # type: ignore[assignment]
        self.machine, self.scaler = machine, scaler
        # Of a divided model, whose gradients are added up within the backward pass.
        self.shards = shards
        self.room = Room(machine.micro_batch, "training", machine, fixed=shards is not None)
        self.team = team
        self.gradients: Gradients | None = None
        if team.size > 1 and shards is None:
            self.gradients = Gradients(team, [p for p in model.parameters() if p.requires_grad])
        # A factor is start + slope * position, at most full.
        ramps = [(w.weight, w.ramp) for w in self.weights.values()]
        self.start, self.slope, self.full = (
            torch.tensor(values, device=machine.device)
            for values in (
                [0.0 if ramp else weight for weight, ramp in ramps],
                [weight / ramp if ramp else 0.0 for weight, ramp in ramps],
                [weight for weight, _ in ramps],
            )
        )

    def factors(self, position: float) -> Tensor:
        """The weight of each term `position` epochs into the fit: shape (terms,)."""
        return torch.add(self.start, self.slope, alpha=position).minimum(self.full)

    def per_sample(self) -> dict[str, nn.Module]:
        """The terms that need neither the whole batch nor the whole training set."""
        return {name: term for name, term in self.terms.items() if per_sample(term)}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Model outputs under the machine's precision, handed to the terms as fp32."""
        if self.machine.autocast is None:
            outputs: dict[str, Tensor] = model(batch)
            return outputs
        with torch.autocast(self.machine.device.type, self.machine.autocast):
            outputs = model(batch)
        return {k: v.float() if v.is_floating_point() else v for k, v in outputs.items()}

    @property
    def micro_batch(self) -> int | None:
        """Most samples in one forward pass; None: the whole batch."""
        return self.room.size

    def backward(self, batch: Batch, position: float, samples: int | None = None) -> Tensor:
        """Add the gradient of the batch to ``.grad``; returns (total, weight): (terms, 2).

        Each process of a team has the undivided batch, or else its own part of the `samples`. When
        a device has too little memory the step starts again with half the micro-batch, and so do
        all after it.
        """
        n = samples or len(batch["index"])
        return self.room.within(
            lambda size: self.attempt(batch, position, n, size),
            self.team.largest(n),
            undo=self.model.zero_grad,
        )

    def attempt(self, batch: Batch, position: float, samples: int, size: int) -> Tensor:
        """The same in micro-batches of `size`, whether or not there is memory for that."""
        factors = self.factors(position)
        if size < samples or self.team.size > 1:
            return self._accumulate(batch, factors, samples, size)
        totals, weights = add_up(self.terms, self.forward(self.model, batch), batch)
        self.scaler.scale(combine(totals, weights, factors)).backward()
        return torch.stack([totals.detach(), weights], 1)

    def _accumulate(self, batch: Batch, factors: Tensor, samples: int, size: int) -> Tensor:
        """The same gradient in two passes over micro-batches, and over processes.

        The first, without gradient, finds the weights and the outputs that whole-batch terms read;
        the second repeats each micro-batch with the same random numbers and adds its gradient. A
        process with one micro-batch keeps the graph of the first pass.
        """
        team, own = self.team, batch
        if len(batch["index"]) == samples:
            part = team.part(samples)
            own = {name: column[part] for name, column in batch.items()}
        pieces = Pieces(own, batch, size, -(-team.largest(samples) // size))
        factor, of_whole = factors.split([len(self.single), len(self.whole)])
        values, seen = self._together(lambda: self._survey(pieces))
        values = team.sum(values)
        weights = values[:, 1]
        cached: dict[str, tuple[Tensor, ...]] = {}
        if self.whole:
            joined = {n: team.gather(part, samples).requires_grad_() for n, part in seen.items()}
            whole = add_up(self.whole, joined, batch)
            combine(*whole, of_whole).backward()
            cached = {
                name: output.grad[team.part(samples)].split(size)
                for name, output in joined.items()
                if output.grad is not None
            }
            values = torch.cat([values, torch.stack(whole, 1).detach()])
        self._together(lambda: self._replay(pieces, weights, factor, cached))
        if self.gradients is not None:
            self.gradients.settle()
        elif self.shards is not None:
            self.shards.settle(self.model)
        return values

    def _together(self, work: Callable[[], Value]) -> Value:
        """Do this process's share of the work; out of memory on one is out of memory on all."""
        if self.shards is not None:  # it talks to the others while it works
            return work()
        error: RuntimeError | None = None
        try:
            done = work()
        except RuntimeError as raised:
            if not out_of_memory(raised):
                raise
            error = raised
        if any(self.team.most(error is not None)):
            raise error or torch.OutOfMemoryError("of another process")
        return done

    def _survey(self, pieces: "Pieces") -> tuple[Tensor, dict[str, Tensor]]:
        """Over all micro-batches: (total, weight) of per-sample terms, and the outputs that
        whole-batch terms read. Each keeps the state of the random generators before it.
        """
        sums = []
        seen: dict[str, list[Tensor]] = {n: [] for t in self.whole.values() for n in reads(t)}
        pieces.states.clear()
        for piece, real in pieces:
            pieces.states.append(torch_state())
            with torch.set_grad_enabled(len(pieces) == 1):
                outputs = self.forward(self.model, piece)
            with torch.no_grad():
                sums.append(real * torch.stack(add_up(self.single, outputs, piece), 1))
            for name, parts in seen.items():
                parts.append(outputs[name].detach()[: real * len(piece["index"])])
            pieces.outputs = outputs if len(pieces) == 1 else None
        return torch.stack(sums).sum(0), {name: torch.cat(parts) for name, parts in seen.items()}

    def _replay(
        self,
        pieces: "Pieces",
        weights: Tensor,
        factors: Tensor,
        cached: Mapping[str, tuple[Tensor, ...]],
    ) -> None:
        """The gradient of every micro-batch; `cached` are those of the whole-batch terms."""
        sums = self.gradients or self.shards
        with nullcontext() if sums is None else sums.summed():
            for number, (piece, real) in enumerate(pieces):
                if sums is not None:
                    sums.send(now=number + 1 == len(pieces))
                outputs = pieces.outputs
                if outputs is None:
                    set_torch_state(pieces.states[number])
                    outputs = self.forward(self.model, piece)
                totals, _ = add_up(self.single, outputs, piece)
                losses = [combine(totals, weights, factors)]
                if real:
                    losses += [(outputs[n] * parts[number]).sum() for n, parts in cached.items()]
                else:
                    losses += [outputs[name].sum() for name in cached]
                self.scaler.scale(real * torch.stack(losses).sum()).backward()


class Pieces:
    """A process's micro-batches, `count` of them, as many as every other has.

    Where its own samples are too few for that it borrows one, which then counts nothing (False):
    all processes do the same, and every parameter that has a gradient has one everywhere.
    """

    def __init__(self, own: Batch, borrowed: Batch, size: int, count: int) -> None:
        self.list = [(piece, True) for piece in split(own, size)]
        for _ in range(count - len(self.list)):
            self.list.append(({name: column[:1] for name, column in borrowed.items()}, False))
        self.states: list[Any] = []
        self.outputs: dict[str, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        return iter(self.list)

    def __len__(self) -> int:
        return len(self.list)


def combine(totals: Tensor, weights: Tensor, factors: Tensor) -> Tensor:
    """The sum of factor * total / weight over terms; a weight of zero comes with a total of zero
    (no known label, no pair).
    """
    return totals.dot((factors / weights.clamp(min=1e-12)).to(totals))
