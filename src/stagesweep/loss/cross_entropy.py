"""Cross-entropy over the labelled samples."""

from torch import Tensor, nn
from torch.nn.functional import nll_loss

from stagesweep.base.view import Batch


class CrossEntropy(nn.Module):
    """Cross-entropy of log-probabilities (B, k) and a label, a sum over the labelled samples."""

    def __init__(self, label: str, output: str = "log_assignment") -> None:
        super().__init__()
        self.label, self.output = label, output

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over the labelled samples (label 0 or more), and their number."""
        label = batch[self.label]
        known = label >= 0
        target = label.masked_fill(~known, -100)
        total = nll_loss(outputs[self.output].float(), target, ignore_index=-100, reduction="sum")
        return total, known.sum().to(total)
