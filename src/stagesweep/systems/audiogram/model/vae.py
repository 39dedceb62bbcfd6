"""Contrastive variational autoencoder with deep embedded clustering."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from stagesweep.base.spec import Spec
from stagesweep.base.view import Batch
from stagesweep.model.cluster_centres import StudentTAssignment
from stagesweep.systems.audiogram.model.decoder import Decoder
from stagesweep.systems.audiogram.model.encoder import Encoder

POSITIVE = "positive/"


class ClusteringVAE(nn.Module):
    """A VAE (Kingma & Welling 2014) whose latent means are softly assigned to cluster centres
    (Xie et al. 2016) and projected for a contrastive loss (Khosla et al. 2020).

    `spec` determines the paths of encoder and decoder: attention over ordered features (`heads`,
    `head_dim`, `frequency_width`), convolutions over pixels (`channels`, `pixel_width`), an MLP
    over categories and all other features (`embedding`, `tabular_width`). `hidden` are the widths
    from the joined paths to the latent, `projection` the width of the contrastive projection,
    `clusters` the initial number of centres.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        latent: int = 10,
        hidden: Sequence[int] = (64, 32, 16),
        heads: int = 2,
        head_dim: int = 8,
        embedding: int = 4,
        channels: Sequence[int] = (),
        frequency_width: int = 16,
        tabular_width: int = 24,
        pixel_width: int = 64,
        projection: int = 32,
        clusters: int = 12,
    ) -> None:
        super().__init__()
        self.latent = latent
        # Activation checkpointing; set by the run from the hardware profile.
        self.checkpointed = False
        widths = {
            "frequency_width": frequency_width,
            "tabular_width": tabular_width,
            "pixel_width": pixel_width,
        }
        self.encoder = Encoder(
            spec,
            latent=latent,
            hidden=hidden,
            heads=heads,
            head_dim=head_dim,
            embedding=embedding,
            channels=channels,
            **widths,
        )
        self.decoder = Decoder(spec, latent=latent, hidden=hidden, **widths)
        self.clusters = StudentTAssignment(clusters, latent)
        self.projection = nn.Sequential(
            nn.Linear(latent, projection), nn.SiLU(), nn.Linear(projection, projection)
        )

    def sample_noise(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the standard normal `noise` (n, d) that samples `n` latent distributions."""
        noise = torch.randn(n, self.latent, generator=generator, device=generator.device)
        return {"noise": noise}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Encode, decode and assign a batch; project it if it has positives.

        Returns `mean`, `logvar`, `latent` (B, d), `assignment` (B, k), every feature (B, w) in
        native units and the logits (B, n) of every category. `latent` is the mean unless the batch
        has `noise` (B, d). With `positive/...` columns also `positive/assignment` (B, k), and
        `projection` and `positive/projection` (B, p) of length one. Positives are encoded to their
        mean and not decoded.
        """
        mean, logvar = self._run(self.encoder, batch)
        latent = mean
        if (noise := batch.get("noise")) is not None:
            latent = mean + torch.exp(0.5 * logvar) * noise
        outputs = {
            "mean": mean,
            "logvar": logvar,
            "latent": latent,
            "assignment": self.clusters(mean),
            **self._run(self.decoder, latent, batch),
        }
        positive = {
            name.removeprefix(POSITIVE): column
            for name, column in batch.items()
            if name.startswith(POSITIVE)
        }
        if positive:
            other, _ = self._run(self.encoder, positive)
            outputs["projection"] = self._project(mean)
            outputs[POSITIVE + "projection"] = self._project(other)
            outputs[POSITIVE + "assignment"] = self.clusters(other)
        return outputs

    def _project(self, mean: Tensor) -> Tensor:
        return normalize(self.projection(mean).float(), dim=1)

    def _run(self, block: Callable[..., Any], *arguments: Any) -> Any:
        if self.checkpointed and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)
