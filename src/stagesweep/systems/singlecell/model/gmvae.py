"""Gaussian-mixture variational autoencoder of gene counts."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stagesweep.base.spec import Spec
from stagesweep.base.view import Batch
from stagesweep.model.cluster_centres import ClusterCentres
from stagesweep.systems.singlecell.likelihood import nonzero_index
from stagesweep.systems.singlecell.model.layers import hidden_layers
from stagesweep.systems.singlecell.normalise import log_normalise


class SparseDropout(nn.Dropout):
    """Dropout of a matrix (B, g) that is mostly zeros.

    On the CPU random numbers are drawn for the non-zero values only. On a GPU this would need a
    synchronisation to find their number, which takes longer than drawing all.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout in training mode; return the values unchanged in evaluation mode."""
        if not self.training or x.is_cuda or x.requires_grad:
            return super().forward(x)
        index = nonzero_index(x.view(-1))
        kept = super().forward(x.view(-1)[index])
        return x.new_zeros(x.numel()).index_copy_(0, index, kept).view_as(x)


class GaussianMixturePrior(ClusterCentres):
    """Mixture of diagonal Gaussians N(m_k, s_k) in the latent space with weights pi_k."""

    def __init__(self, count: int, latent: int) -> None:
        super().__init__(count, latent)
        self.log_scale = nn.Parameter(torch.zeros(count, latent))
        self.weight = nn.Parameter(torch.zeros(count))

    @torch.no_grad()
    def set_centres(self, centres: Tensor) -> None:
        """Replace the components by unit Gaussians at `centres` (k, d) with equal weights.

        Build the optimizer after this.
        """
        super().set_centres(centres)
        self.log_scale = nn.Parameter(torch.zeros_like(self.centres))
        self.weight = nn.Parameter(self.centres.new_zeros(len(centres)))

    def log_prior(self) -> Tensor:
        """Return log pi, (k,)."""
        return self.weight.log_softmax(0)

    def log_density(self, latent: Tensor) -> Tensor:
        """Return log N_k(z) of latents (B, d) up to a constant that all k share, (B, k), fp32."""
        distance = (latent.float().unsqueeze(1) - self.centres) * (-self.log_scale).exp()
        return -0.5 * distance.square().sum(2) - self.log_scale.sum(1)

    def divergence(self, mean: Tensor, logvar: Tensor) -> Tensor:
        """Return KL(N(mean, exp(logvar)) || N_k) of latent Gaussians (B, d), (B, k), fp32."""
        mean, logvar = mean.float(), logvar.float()
        precision = (-2 * self.log_scale).exp()
        # Squares relative to a common origin, to reduce cancellation.
        origin = self.centres.detach().mean(0)
        mean, centres = mean - origin, self.centres - origin
        square = (logvar.exp() + mean.square()) @ precision.T - 2 * mean @ (precision * centres).T
        square = square + (precision * centres.square()).sum(1)
        constant = (2 * self.log_scale).sum(1) - mean.shape[1]
        return 0.5 * (square + constant - logvar.sum(1, keepdim=True))


class GMVAE(nn.Module):
    """Variational autoencoder of gene counts with a Gaussian mixture prior, one for each cell type.

    The mixture follows VaDE (Jiang et al. 2017), the likelihood scVI (Lopez et al. 2018): means are
    library size x softmax, theta is per gene, zero inflation per gene and cell. Every cell is
    decoded once. In evaluation q(k|x) is the maximiser of the evidence lower bound in closed form,
    pi_k exp(-KL(q(z|x) || N_k)), normalised. In training, with noise, it is p(k|z) of the sampled z
    (ibid., eq. 16), which avoids early overconfidence. There is no separate classifier, so every
    loss on q(k|x) shapes z.

    `components` is the number of Gaussians (null: the number of values of `label`); `hidden` are
    the widths of the encoder, reversed in the decoder; `thinning` is the dropout rate of the
    encoder's input genes, `dropout` that of its hidden units; `likelihood` is zinb, nb or mse.
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
        self.thinning = SparseDropout(thinning)
        self.encoder = hidden_layers([genes, *hidden], dropout)
        self.to_latent = nn.Linear(hidden[-1], 2 * latent)
        # Named as in other models, because stages initialise `clusters`.
        self.clusters = GaussianMixturePrior(components or spec.labels[label], latent)
        widths = [latent, *reversed(hidden)]
        self.decoder = hidden_layers(widths, 0.0)
        self.to_scores = nn.Linear(widths[-1], genes)
        self.likelihood = likelihood
        if likelihood != "mse":
            self.log_theta = nn.Parameter(torch.zeros(genes))
        if likelihood == "zinb":
            # Reads the narrow latent: on the last hidden layer this head would cost as much as that
            # of the means, a third of a step.
            self.to_dropout = nn.Linear(latent, genes)
            nn.init.constant_(self.to_dropout.bias, -2.0)

    def sample_noise(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the standard normal noise of `n` latent samples."""
        noise = torch.randn(n, self.latent, generator=generator, device=generator.device)
        return {"noise": noise}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Encode a batch (`counts` (B, g), `library` (B, 1)), assign its cells and decode it.

        Returns `mean`, `logvar`, `latent` (B, d), `divergence` from each component,
        `assignment` and `log_assignment` (B, k), `log_prior` (k,), `scores` (B, g) and, depending
        on the likelihood, `log_theta` (g,) and `dropout` (B, g). `latent` is the mean unless the
        batch has `noise` (B, d).
        """
        hidden = self.encoder(self.thinning(log_normalise(batch["counts"], batch["library"])))
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
