"""KL divergence of the latent distribution from a Gaussian mixture prior."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch


class MixtureKL(nn.Module):
    """sum_k q(k|x) KL(q(z|x) || N_k) + KL(q(k|x) || pi), summed over samples (Jiang et al. 2017,
    eq. 9).

    Reads the outputs `divergence` (B, k), `log_prior` (k,) and `log_assignment` (B, k), which is
    log q(k|x). If `label` names a column, q(k|x) of a labelled sample is its known component
    (Kingma et al. 2014, eq. 6).
    """

    def __init__(self, label: str | None = None) -> None:
        super().__init__()
        self.label = label

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum over samples and the number of samples."""
        log_q = outputs["log_assignment"].float()
        cost = outputs["divergence"].float() - outputs["log_prior"].float()
        each = (log_q.exp() * (cost + log_q)).sum(1)
        if self.label is not None:
            known = batch[self.label].clamp(min=0).unsqueeze(1)
            each = torch.where(batch[self.label] < 0, each, cost.gather(1, known).squeeze(1))
        return each.sum(), each.new_full((), len(each))
