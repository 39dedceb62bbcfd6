"""Divergence of the latent distribution from its prior."""

from torch import Tensor, nn

from stagesweep.base.view import Batch


class KL(nn.Module):
    """KL(N(mean, exp(logvar)) || N(0, 1)), closed form (Kingma & Welling 2014, appendix B).

    `free_bits`: nats of each latent and sample that cost nothing (Kingma et al. 2016, appendix
    C.8, here by sample rather than by batch, so that the sum does not depend on how a batch is
    cut). A latent that the decoder does not use yet is then not pressed to zero.
    """

    def __init__(self, free_bits: float = 0.0) -> None:
        super().__init__()
        self.free_bits = free_bits

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over latents and samples."""
        mean, logvar = outputs["mean"].float(), outputs["logvar"].float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        total = divergence.clamp(min=self.free_bits).sum()
        return total, total.new_full((), len(mean))
