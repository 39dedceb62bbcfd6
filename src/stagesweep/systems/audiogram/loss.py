"""Smoothness of decoded audiograms over frequency."""

from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.loss.reconstruction import standardised


class Smoothness(nn.Module):
    """Squared second differences of a decoded, ordered feature in standardised units.

    A sum over samples. A constant slope costs nothing. Only the first `count` names are neighbours,
    because a click is not a frequency; null takes all.
    """

    def __init__(self, feature: str, count: int | None = None) -> None:
        super().__init__()
        self.feature = feature
        self.count = count

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples and second differences, and the number of samples."""
        value = standardised(outputs[self.feature], batch, self.feature)[:, : self.count]
        total = value.diff(n=2, dim=1).square().sum()
        return total, total.new_full((), len(value))
