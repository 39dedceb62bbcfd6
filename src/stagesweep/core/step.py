"""The loss of one effective batch and its gradient, the same for any micro-batch."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from stagesweep import config
from stagesweep.core.seeding import rng_state, set_rng_state
from stagesweep.data.view import Batch
from stagesweep.hardware import Machine


def split(batch: Batch, size: int | None) -> Iterator[Batch]:
    """The batch cut into micro-batches of at most `size` samples."""
    n = len(batch["index"])
    for start in range(0, n, size or n):
        yield {name: column[start : start + (size or n)] for name, column in batch.items()}


class WeightedLoss:
    """A weighted sum of terms, each a mean over what the term says it is a mean over.

    Every term gives (total, weight) of a micro-batch. Totals and weights are added up over the
    effective batch and divided once, so the gradient does not depend on the micro-batch. A term
    that couples samples (``whole_batch`` names the outputs it reads) sees the undivided batch: its
    gradient with respect to those outputs is computed first and replayed through each
    micro-batch (gradient cache, Gao et al. 2021, arXiv:2101.06983).
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Mapping[str, nn.Module],
        weights: Mapping[str, config.Weight],
        machine: Machine,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.weights = {name: weight for name, weight in weights.items() if weight.weight > 0}
        self.terms = {name: terms[name] for name in self.weights}
        self.model = torch.compile(model) if machine.compile else model
        self.machine = machine
        self.scaler = scaler

    def factors(self, position: float) -> list[float]:
        """The weight of each term `position` epochs into the fit."""
        return [
            w.weight * (min(1.0, position / w.ramp) if w.ramp else 1.0)
            for w in self.weights.values()
        ]

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Model outputs under the machine's precision, handed to the terms as fp32."""
        if self.machine.autocast is None:
            outputs: dict[str, Tensor] = model(batch)
            return outputs
        with torch.autocast(self.machine.device.type, self.machine.autocast):
            outputs = model(batch)
        return {k: v.float() if v.is_floating_point() else v for k, v in outputs.items()}

    def sums(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Outputs of a batch, and (total, weight) of each per-sample term: shape (terms, 2)."""
        outputs = self.forward(model, batch)
        pairs = [term(outputs, batch) for term in self.per_sample().values()]
        return outputs, torch.stack([torch.stack(pair) for pair in pairs])

    def per_sample(self) -> dict[str, nn.Module]:
        """The terms that need neither the whole batch nor the whole training set."""
        return {
            name: term
            for name, term in self.terms.items()
            if not hasattr(term, "whole_batch") and not hasattr(term, "refresh")
        }

    def backward(self, batch: Batch, position: float) -> Tensor:
        """Add the gradient of the batch to ``.grad``; returns (total, weight): (terms, 2)."""
        factors = self.factors(position)
        if self.machine.micro_batch and self.machine.micro_batch < len(batch["index"]):
            return self._accumulate(batch, factors)
        outputs = self.forward(self.model, batch)
        flat = [value for term in self.terms.values() for value in term(outputs, batch)]
        loss = self._combine(flat[::2], flat[1::2], factors)
        self.scaler.scale(loss).backward()
        return torch.stack(flat).detach().view(-1, 2)

    @staticmethod
    def _combine(totals: list[Tensor], weights: list[Tensor], factors: list[float]) -> Tensor:
        # A weight of zero (no known label, no pair) comes with a total of zero.
        parts = [
            total * (factor / weight.clamp(min=1e-12))
            for total, weight, factor in zip(totals, weights, factors, strict=True)
        ]
        return torch.stack(parts).sum()

    def _accumulate(self, batch: Batch, factors: list[float]) -> Tensor:
        """The same gradient in two passes over micro-batches.

        The first, without gradient, finds the weights and the outputs that whole-batch terms read;
        the second repeats each micro-batch with the same random numbers and adds its gradient.
        """
        pieces = list(split(batch, self.machine.micro_batch))
        whole = {n: t for n, t in self.terms.items() if hasattr(t, "whole_batch")}
        reads = {output for term in whole.values() for output in term.whole_batch}
        sums = torch.zeros(len(self.terms), 2, device=batch["index"].device)
        seen: dict[str, list[Tensor]] = {name: [] for name in reads}
        states = []
        with torch.no_grad():
            for piece in pieces:
                states.append(rng_state())
                outputs = self.forward(self.model, piece)
                for row, (name, term) in enumerate(self.terms.items()):
                    if name not in whole:
                        sums[row] += torch.stack(term(outputs, piece))
                for name in reads:
                    seen[name].append(outputs[name])
        joined = {name: torch.cat(parts).requires_grad_() for name, parts in seen.items()}
        cached: dict[str, Tensor] = {}
        if whole:
            rows = [row for row, name in enumerate(self.terms) if name in whole]
            pairs = [term(joined, batch) for term in whole.values()]
            sums[rows] = torch.stack([torch.stack(pair) for pair in pairs]).detach()
            totals, weights = (list(column) for column in zip(*pairs, strict=True))
            loss = self._combine(totals, weights, [factors[row] for row in rows])
            gradients = torch.autograd.grad(loss, list(joined.values()), allow_unused=True)
            cached = {k: g for k, g in zip(joined, gradients, strict=True) if g is not None}
        start = 0
        for piece, state in zip(pieces, states, strict=True):
            set_rng_state(state)
            outputs = self.forward(self.model, piece)
            rows = [row for row, name in enumerate(self.terms) if name not in whole]
            totals = [t(outputs, piece)[0] for n, t in self.terms.items() if n not in whole]
            stop = start + len(piece["index"])
            parts = [(outputs[k] * g[start:stop]).sum() for k, g in cached.items()]
            parts.append(self._combine(totals, list(sums[rows, 1]), [factors[row] for row in rows]))
            self.scaler.scale(torch.stack(parts).sum()).backward()
            start = stop
        return sums
