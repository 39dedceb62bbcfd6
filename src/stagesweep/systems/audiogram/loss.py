"""Neighbouring features (the frequencies of an audiogram) do not jump."""

from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.loss.reconstruction import standardised


class Smoothness(nn.Module):
    """Squared second differences of a decoded, ordered feature, in standardised units; a sum
    over samples.

    A steady slope costs nothing, a single frequency out of line does. Only the first `count`
    names are neighbours (a click has no place among the frequencies); null takes all.
    """

    def __init__(self, feature: str, count: int | None = None) -> None:
        super().__init__()
        self.feature = feature
        self.count = count

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples and second differences."""
        value = standardised(outputs[self.feature], batch, self.feature)[:, : self.count]
        total = value.diff(n=2, dim=1).square().sum()
        return total, total.new_full((), len(value))
