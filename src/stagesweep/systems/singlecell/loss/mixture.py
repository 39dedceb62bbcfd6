"""Divergence of the latent distribution from a mixture of Gaussians."""

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch


class Mixture(nn.Module):
    """sum_k q(k|x) KL(q(z|x) || N_k) + KL(q(k|x) || pi), a sum over samples (Jiang et al. 2017,
    eq. 9), from `divergence` (B, k) and `log_prior` (k,).

    q(k|x) is the model's `log_assignment`. Where `label` names a column and a sample has one, it
    is that component alone (Kingma et al. 2014, eq. 6).
    """

    def __init__(self, label: str | None = None) -> None:
        super().__init__()
        self.label = label

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples, and their number."""
        log_q = outputs["log_assignment"].float()
        cost = outputs["divergence"].float() - outputs["log_prior"].float()
        each = (log_q.exp() * (cost + log_q)).sum(1)
        if self.label is not None:
            known = batch[self.label].clamp(min=0).unsqueeze(1)
            each = torch.where(batch[self.label] < 0, each, cost.gather(1, known).squeeze(1))
        return each.sum(), each.new_full((), len(each))
