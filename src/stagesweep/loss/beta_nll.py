"""How far predictions are from what was measured, for what the model says of its own doubt."""

from torch import Tensor, nn

from stagesweep.base.view import Batch


class BetaNLL(nn.Module):
    """Gaussian negative log-likelihood weighed by variance^beta (Seitzer et al. 2022, eq. 5), a sum
    over observed values.

    At `beta` 0 it is the likelihood itself, whose gradient neglects what is badly predicted; at 1
    the mean learns as from a squared error. It reads ``<name>/predicted``, ``<name>/logvar``,
    ``<name>/target`` and ``<name>/observed`` (B, n).
    """

    def __init__(self, name: str, beta: float = 0.5) -> None:
        super().__init__()
        self.name, self.beta = name, beta

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over observed values, and their number."""
        read = ("predicted", "logvar", "target", "observed")
        mean, logvar, target, seen = (outputs[f"{self.name}/{part}"].float() for part in read)
        each = 0.5 * (logvar + (target - mean).square() * (-logvar).exp())
        return (each * (self.beta * logvar.detach()).exp() * seen).sum(), seen.sum()
