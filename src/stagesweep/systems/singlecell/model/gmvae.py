"""Gaussian-mixture variational autoencoder of gene counts."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from stagesweep.base.spec import Spec
from stagesweep.base.view import Batch
from stagesweep.model.cluster_centres import ClusterCentres
from stagesweep.systems.singlecell.likelihood import places
from stagesweep.systems.singlecell.normalise import normalised


class Thinning(nn.Dropout):
    """Dropout of mostly zeros (B, g): on the CPU, numbers are drawn for the others alone. A GPU
    would have to wait to learn how many there are, and draws them faster than that.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The values while it does not train; else some are zero, and the others larger."""
        if not self.training or x.is_cuda or x.requires_grad:
            return super().forward(x)
        there = places(x.view(-1))
        kept = super().forward(x.view(-1)[there])
        return x.new_zeros(x.numel()).index_copy_(0, there, kept).view_as(x)


class Components(ClusterCentres):
    """Diagonal Gaussians N(m_k, s_k) in the latent space and their shares pi_k."""

    def __init__(self, count: int, latent: int) -> None:
        super().__init__(count, latent)
        self.log_scale = nn.Parameter(torch.zeros(count, latent))
        self.weight = nn.Parameter(torch.zeros(count))

    @torch.no_grad()
    def set_centres(self, centres: Tensor) -> None:
        """Replace all by Gaussians of scale one around `centres` (k, d), of equal shares; an
        optimizer must be built after this.
        """
        super().set_centres(centres)
        self.log_scale = nn.Parameter(torch.zeros_like(self.centres))
        self.weight = nn.Parameter(self.centres.new_zeros(len(centres)))

    def log_prior(self) -> Tensor:
        """The logarithm of pi, (k,)."""
        return self.weight.log_softmax(0)

    def log_density(self, latent: Tensor) -> Tensor:
        """Log of N_k(z) of latents (B, d), (B, k), fp32, but for the constant that all k share."""
        distance = (latent.float().unsqueeze(1) - self.centres) * (-self.log_scale).exp()
        return -0.5 * distance.square().sum(2) - self.log_scale.sum(1)

    def divergence(self, mean: Tensor, logvar: Tensor) -> Tensor:
        """KL(N(mean, exp(logvar)) || N_k) of latent Gaussians (B, d) and every k, (B, k), fp32."""
        mean, logvar = mean.float(), logvar.float()
        precision = (-2 * self.log_scale).exp()
        # Squares about a common point, so that little cancels.
        origin = self.centres.detach().mean(0)
        mean, centres = mean - origin, self.centres - origin
        square = (logvar.exp() + mean.square()) @ precision.T - 2 * mean @ (precision * centres).T
        square = square + (precision * centres.square()).sum(1)
        constant = (2 * self.log_scale).sum(1) - mean.shape[1]
        return 0.5 * (square + constant - logvar.sum(1, keepdim=True))


class GMVAE(nn.Module):
    """A variational autoencoder of counts with one Gaussian prior for each cell type.

    The mixture is VaDE's (Jiang et al. 2017), the likelihood scVI's (Lopez et al. 2018): means are
    library size x softmax, theta is of each gene, zero inflation of each gene and cell. Every cell
    is decoded once. q(k|x) is what makes the evidence bound largest, in closed form: pi_k
    exp(-KL(q(z|x) || N_k)), normalised; with noise, while it learns, it is p(k|z) of the sampled z
    (ibid., eq. 16), which keeps it from being sure too soon. There is no classifier beside it, so
    that whatever trains q(k|x) shapes z.

    `components` is the number of Gaussians (null: as many as the data has of `label`); `hidden` are
    the widths of the encoder, reversed in the decoder; `thinning` is the share of genes that the
    encoder does not see while it learns, `dropout` that of its hidden units; `likelihood` is zinb,
    nb or mse.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        latent: int = 64,
        hidden: Sequence[int] = (512, 256),
        components: int | None = None,
        label: str = "label",
        thinning: float = 0.5,
        dropout: float = 0.1,
        likelihood: Literal["zinb", "nb", "mse"] = "zinb",
    ) -> None:
        super().__init__()
        self.latent = latent
        genes = len(spec.features["counts"].names)
        self.thinning = Thinning(thinning)
        self.encoder = _layers([genes, *hidden], dropout)
        self.to_latent = nn.Linear(hidden[-1], 2 * latent)
        # Called as in other models whose clusters a stage places.
        self.clusters = Components(components or spec.labels[label], latent)
        widths = [latent, *reversed(hidden)]
        self.decoder = _layers(widths, 0.0)
        self.to_scores = nn.Linear(widths[-1], genes)
        self.likelihood = likelihood
        if likelihood != "mse":
            self.log_theta = nn.Parameter(torch.zeros(genes))
        if likelihood == "zinb":
            # From the latent, which is narrow: behind the last hidden layer this head would cost as
            # much as that of the means, a third of a step.
            self.to_dropout = nn.Linear(latent, genes)
            nn.init.constant_(self.to_dropout.bias, -2.0)

    def sample_noise(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the standard normal numbers that turn `n` latent distributions into samples."""
        noise = torch.randn(n, self.latent, generator=generator, device=generator.device)
        return {"noise": noise}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Encode a batch (`counts` (B, g), `library` (B, 1)), assign it and decode it once.

        Returns `mean`, `logvar`, `latent` (B, d), `divergence` from each component,
        `assignment` and `log_assignment` (B, k), `log_prior` (k,), `scores` (B, g) and, as the
        likelihood has them, `log_theta` (g,) and `dropout` (B, g). `latent` is the mean unless the
        batch has `noise` (B, d).
        """
        hidden = self.encoder(self.thinning(normalised(batch["counts"], batch["library"])))
        mean, logvar = self.to_latent(hidden).float().chunk(2, 1)
        logvar = logvar.clamp(-10, 4)
        divergence, log_prior = self.clusters.divergence(mean, logvar), self.clusters.log_prior()
        latent, evidence = mean, -divergence
        if (noise := batch.get("noise")) is not None:
            latent = mean + torch.exp(0.5 * logvar) * noise
            evidence = self.clusters.log_density(latent)
        log_assignment = (log_prior + evidence).log_softmax(1)
        outputs = {
            "mean": mean,
            "logvar": logvar,
            "latent": latent,
            "divergence": divergence,
            "log_prior": log_prior,
            "log_assignment": log_assignment,
            "assignment": log_assignment.exp(),
            "scores": self.to_scores(self.decoder(latent)),
        }
        if self.likelihood != "mse":
            outputs["log_theta"] = self.log_theta.clamp(-12, 12)
        if self.likelihood == "zinb":
            outputs["dropout"] = self.to_dropout(latent)
        return outputs


def _layers(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """Linear, normalised, bent layers. LayerNorm: what a cell gets must not depend on the others
    of its micro-batch.
    """
    blocks = [
        nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.SiLU(), nn.Dropout(dropout))
        for a, b in pairwise(widths)
    ]
    return nn.Sequential(*blocks)
