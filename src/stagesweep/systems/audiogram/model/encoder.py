"""The encoder: from the columns of a batch to the parameters of the latent distribution."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import Batch


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers of the given widths, each followed by layer norm and SiLU."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        layers += [nn.Linear(inner, outer), nn.LayerNorm(outer), nn.SiLU()]
    return nn.Sequential(*layers)


def masked_input(batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """Input (B, w) of a feature, 0 where missing, and its mask (B, w) as floats."""
    value = batch[name]
    if (mask := batch.get(f"{name}/mask")) is None:
        return value, torch.ones_like(value)
    return value.masked_fill(~mask, 0), mask.to(value.dtype)


class FrequencyAttention(nn.Module):
    """Self-attention over ordered features, with a learned embedding of each frequency.

    Missing values are masked as keys, so no token attends to them; their own tokens attend to the
    observed ones. The residual connection keeps the measured values.
    """

    def __init__(self, features: Features, heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        count, dim = len(features.names), heads * head_dim
        self.heads = heads
        self.value = nn.Linear(2, dim)
        self.frequency = nn.Parameter(torch.randn(count, dim) * 0.5)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.mix = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.join = mlp([count * dim, width])

    def forward(self, value: Tensor, mask: Tensor) -> Tensor:
        """Map values and their mask (B, w) to features (B, width)."""
        tokens = self.value(torch.stack([value, mask], 2)) + self.frequency
        parts = self.query_key_value(tokens).view(*tokens.shape[:2], 3, self.heads, -1)
        query, key, content = parts.permute(2, 0, 3, 1, 4).unbind()
        # Large but finite: -inf would give NaN for a sample without any observed value.
        hidden = ((mask - 1) * 1e4)[:, None, None].to(query.dtype)
        mixed = scaled_dot_product_attention(query, key, content, attn_mask=hidden)
        tokens = self.norm(tokens + self.mix(mixed.transpose(1, 2).flatten(2)))
        return self.join(tokens.flatten(1))  # type: ignore[no-any-return]


class PixelPath(nn.Module):
    """3x3 convolutions over an image, with stride 2 after the first; no channels: linear only."""

    def __init__(self, features: Features, channels: Sequence[int], width: int) -> None:
        super().__init__()
        assert features.grid is not None, "only features on a grid are an image"
        self.grid = features.grid
        layers: list[nn.Module] = []
        for depth, (inner, outer) in enumerate(pairwise([1, *channels])):
            stride = 1 if depth == 0 else 2
            layers += [nn.Conv2d(inner, outer, 3, stride, padding=1), nn.SiLU()]
        self.convolutions = nn.Sequential(*layers)
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, 1, *self.grid)).numel()
        self.join = mlp([flat, width])

    def forward(self, value: Tensor) -> Tensor:
        """Map pixels (B, height * width), row by row, to features (B, width)."""
        image = value.view(-1, 1, *self.grid)
        return self.join(self.convolutions(image).flatten(1))  # type: ignore[no-any-return]


class TabularPath(nn.Module):
    """MLP of unordered features, their masks and learned embeddings of categories."""

    def __init__(
        self, widths: dict[str, int], categories: dict[str, int], embedding: int, width: int
    ) -> None:
        super().__init__()
        self.continuous = list(widths)
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(count, embedding) for name, count in categories.items()}
        )
        self.join = mlp([2 * sum(widths.values()) + embedding * len(categories), width])

    def forward(self, batch: Batch) -> Tensor:
        """Map the columns of `batch` to features (B, width)."""
        parts = [part for name in self.continuous for part in masked_input(batch, name)]
        parts += [embed(batch[name]) for name, embed in self.embeddings.items()]
        return self.join(torch.cat(parts, 1))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A path for each kind of column, joined by hidden layers, then mean and log-variance."""

    def __init__(
        self,
        spec: Spec,
        *,
        latent: int,
        hidden: Sequence[int],
        heads: int,
        head_dim: int,
        embedding: int,
        channels: Sequence[int],
        frequency_width: int,
        tabular_width: int,
        pixel_width: int,
    ) -> None:
        super().__init__()
        self.frequencies = nn.ModuleDict()
        self.pixels = nn.ModuleDict()
        self.tabular: TabularPath | None = None
        rest: dict[str, int] = {}
        joined = 0
        for name, features in spec.features.items():
            if features.grid is not None:
                self.pixels[name] = PixelPath(features, channels, pixel_width)
                joined += pixel_width
            elif features.ordered:
                self.frequencies[name] = FrequencyAttention(
                    features, heads, head_dim, frequency_width
                )
                joined += frequency_width
            else:
                rest[name] = len(features.names)
        if rest or spec.categories:
            self.tabular = TabularPath(rest, spec.categories, embedding, tabular_width)
            joined += tabular_width
        self.hidden = mlp([joined, *hidden])
        self.mean = nn.Linear(hidden[-1], latent)
        self.logvar = nn.Linear(hidden[-1], latent)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Map the columns of `batch` to mean and log-variance, both (B, d) in fp32."""
        parts = [path(*masked_input(batch, name)) for name, path in self.frequencies.items()]
        parts += [path(masked_input(batch, name)[0]) for name, path in self.pixels.items()]
        if self.tabular is not None:
            parts.append(self.tabular(batch))
        joined = self.hidden(torch.cat(parts, 1))
        # Clamped, because the exponential of a larger log-variance can overflow.
        return self.mean(joined).float(), self.logvar(joined).float().clamp(-10, 10)
