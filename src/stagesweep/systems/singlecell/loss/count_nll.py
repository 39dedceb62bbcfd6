"""Negative log-likelihood of gene counts under the decoded distribution."""

from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.systems.singlecell.likelihood import negative_binomial_nll
from stagesweep.systems.singlecell.normalise import log_normalise


class CountNLL(nn.Module):
    """Negative log-likelihood of the counts in nats, summed over genes and cells.

    The distribution follows the model's outputs: zero-inflated negative binomial with `dropout`,
    negative binomial with `log_theta` only, else a Gaussian of log-normalised counts (half the
    squared error, up to a constant).
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum over cells and the number of cells."""
        scores, counts, library = outputs["scores"].float(), batch["counts"], batch["library"]
        if "log_theta" in outputs:
            dropout = outputs.get("dropout")
            total = negative_binomial_nll(
                scores,
                outputs["log_theta"].float(),
                None if dropout is None else dropout.float(),
                counts,
                library,
            )
        else:
            total = 0.5 * (scores - log_normalise(counts, library)).square().sum()
        return total, total.new_full((), len(scores))
