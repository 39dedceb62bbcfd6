"""KL divergence of the latent distribution from its prior."""

from torch import Tensor, nn

from stagesweep.base.view import Batch


class KL(nn.Module):
    """KL(N(mean, exp(logvar)) || N(0, 1)), closed form (Kingma & Welling 2014, appendix B).

    `free_bits` is the KL, in nats for each latent and sample, that costs nothing (Kingma et al.
    2016, appendix C.8; here for each sample rather than the batch mean, so that the sum does not
    depend on the micro-batch). It keeps latents active that the decoder does not use yet.
    """

    def __init__(self, free_bits: float = 0.0) -> None:
        super().__init__()
        self.free_bits = free_bits

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over latents and samples, and the number of samples."""
        mean, logvar = outputs["mean"].float(), outputs["logvar"].float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
        total = divergence.clamp(min=self.free_bits).sum()
        return total, total.new_full((), len(mean))
