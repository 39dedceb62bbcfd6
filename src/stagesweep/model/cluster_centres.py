"""Cluster centres in the latent space and soft assignment to them."""

from typing import Any

import torch
from torch import Tensor, nn


class ClusterCentres(nn.Module):
    """Points (k, d) in the latent space.

    Their number may change between stages, and follows the weights that are loaded.
    """

    def __init__(self, count: int, latent: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(count, latent))
        self.register_load_state_dict_pre_hook(resize_to_weights)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def set_centres(self, centres: Tensor) -> None:
        """Replace all centres by `centres` (k, d); build the optimizer after this call."""
        self.centres = nn.Parameter(centres.detach().clone().to(self.centres))


def resize_to_weights(
    module: ClusterCentres, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Give the centres the shape of the weights that are about to be loaded."""
    saved = state_dict.get(prefix + "centres")
    if saved is not None and saved.shape != module.centres.shape:
        module.set_centres(saved)


class StudentTAssignment(ClusterCentres):
    """Student-t soft assignment (Xie et al. 2016, eq. 1, alpha = 1)."""

    def forward(self, mean: Tensor) -> Tensor:
        """Map latent means (B, d) to assignments (B, k) whose rows sum to one, in fp32."""
        distance = (mean.float().unsqueeze(1) - self.centres).square().sum(2)
        similarity = 1 / (1 + distance)
        return similarity / similarity.sum(1, keepdim=True)
