"""Gaussian likelihood with a predicted variance."""

from torch import Tensor, nn

from stagesweep.base.view import Batch


class BetaNLL(nn.Module):
    """Gaussian negative log-likelihood weighted by variance^beta (Seitzer et al. 2022, eq. 5).

    A sum over observed values. `beta` 0 is the plain likelihood, whose gradient is small where the
    predicted variance is large; at 1 the mean has the gradient of the squared error. Reads
    ``<name>/predicted``, ``<name>/logvar``, ``<name>/target`` and ``<name>/observed``, (B, n) each.
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
