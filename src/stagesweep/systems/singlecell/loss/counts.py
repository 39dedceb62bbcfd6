"""How likely the counts of a cell are under what the model decodes."""

from torch import Tensor, nn

from stagesweep.base.view import Batch
from stagesweep.systems.singlecell.likelihood import negative_log_likelihood
from stagesweep.systems.singlecell.normalise import normalised


class Counts(nn.Module):
    """Negative log-likelihood of the counts in nats, a sum over genes and cells.

    Exact zero-inflated negative binomial where the model gives `dropout`, negative binomial where
    it gives `log_theta` alone; else half the squared error of log-normalised counts, a Gaussian's
    up to a constant.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over cells, and their number."""
        scores, counts, library = outputs["scores"].float(), batch["counts"], batch["library"]
        if "log_theta" in outputs:
            dropout = outputs.get("dropout")
            total = negative_log_likelihood(
                scores,
                outputs["log_theta"].float(),
                None if dropout is None else dropout.float(),
                counts,
                library,
            )
        else:
            total = 0.5 * (scores - normalised(counts, library)).square().sum()
        return total, total.new_full((), len(scores))
