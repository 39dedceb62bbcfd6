"""The weighted sum of loss terms that a fit minimises."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stagesweep.base.terms import per_sample, whole_batch_outputs
from stagesweep.base.view import Batch
from stagesweep.config import schema

Terms = Mapping[str, nn.Module]


class WeightedLoss:
    """A weighted sum of terms, each total divided by the weight that the term returns.

    Every term gives (total, weight) of a micro-batch. Both are added up over the effective batch
    and divided once, so the gradient does not depend on micro-batches and processes. A term of
    weight 0 is left out. A term with a ramp of n epochs rises to its weight linearly.
    """

    def __init__(
        self, terms: Terms, weights: Mapping[str, schema.Weight], device: torch.device
    ) -> None:
        used = {name: terms[name] for name, weight in weights.items() if weight.weight > 0}
        self.whole_batch = {n: term for n, term in used.items() if whole_batch_outputs(term)}
        self.separable = {n: term for n, term in used.items() if n not in self.whole_batch}
        # Rows of (total, weight) are in this order.
        self.terms = self.separable | self.whole_batch
        self.weights = {name: weights[name].weight for name in self.terms}
        # Terms that can be evaluated on another split.
        self.per_sample = {name: term for name, term in self.terms.items() if per_sample(term)}
        # A factor is start + slope * position, at most full.
        ramps = [(weights[name].weight, weights[name].ramp) for name in self.terms]
        self.start, self.slope, self.full = (
            torch.tensor(values, device=device)
            for values in (
                [0.0 if ramp else weight for weight, ramp in ramps],
                [weight / ramp if ramp else 0.0 for weight, ramp in ramps],
                [weight for weight, _ in ramps],
            )
        )

    def factors(self, position: float) -> Tensor:
        """The weight of each term `position` epochs into the fit: shape (terms,)."""
        return torch.add(self.start, self.slope, alpha=position).minimum(self.full)

    @staticmethod
    def sums(terms: Terms, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Totals of the terms and the weights they are sums over, both (terms,)."""
        with full_precision():
            values = [term(outputs, batch) for term in terms.values()]
        if not values:
            empty = batch["index"].new_zeros(0).float()
            return empty, empty
        totals, weights = zip(*values, strict=True)
        return torch.stack(totals), torch.stack(weights).detach()

    @staticmethod
    def combine(totals: Tensor, weights: Tensor, factors: Tensor) -> Tensor:
        """The sum of factor * total / weight over terms.

        A weight of zero comes with a total of zero (no known label, no pair).
        """
        return totals.dot((factors / weights.clamp(min=1e-12)).to(totals))

    def metrics(self, sums: Tensor, terms: Terms, split: str) -> dict[str, float]:
        """Each term's mean and ``<split>_loss``, their weighted sum, from (total, weight).

        With full weights, so that ramps do not show.
        """
        values = (sums[:, 0] / sums[:, 1].clamp(min=1e-12)).tolist()
        total = sum(self.weights[n] * v for n, v in zip(terms, values, strict=True))
        return {f"{split}_loss": total} | {
            f"{split}_{n}": v for n, v in zip(terms, values, strict=True)
        }


@contextmanager
def full_precision() -> Iterator[None]:
    """Use fp32 without TF32, which the model may use for its matrix products.

    The exponentials and logarithms of a loss turn small errors into large ones.
    """
    precision = torch.get_float32_matmul_precision()
    if precision == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
