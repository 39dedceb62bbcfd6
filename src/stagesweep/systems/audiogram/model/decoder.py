"""The decoder: from a latent vector to every column, in native units."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import Batch
from stagesweep.systems.audiogram.model.encoder import mlp


def to_native(
    output: Tensor, features: Features, shift: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Convert an unbounded output (B, w) to native units, inside the range of `features`.

    Bounded features are low + (high - low) * sigmoid. The sigmoid is shifted and scaled so that an
    output of 0 gives `shift`, with slope `scale`. Near the centre the output is thus the
    standardised value: reconstruction starts at the mean, and the latent need not encode the shift
    of a group of samples.
    """
    output = output.float()
    if features.low is None or features.high is None:
        return output if shift is None or scale is None else output * scale + shift
    span = features.high - features.low
    if shift is None or scale is None:
        return features.low + span * torch.sigmoid(output)
    centre = ((shift - features.low) / span).clamp(0.01, 0.99)
    slope = scale / (span * centre * (1 - centre))
    return features.low + span * torch.sigmoid(torch.logit(centre) + slope * output)


class Head(nn.Module):
    """Output head for one kind of column: a hidden layer and a linear output per column."""

    def __init__(self, inner: int, width: int, columns: dict[str, int]) -> None:
        super().__init__()
        self.hidden = mlp([inner, width])
        self.columns = columns
        self.output = nn.Linear(width, sum(columns.values()))
        # Small weights: the first reconstruction is the mean, and gradients are small.
        nn.init.normal_(self.output.weight, std=0.01)
        nn.init.zeros_(self.output.bias)

    def forward(self, value: Tensor) -> dict[str, Tensor]:
        """Map (B, inner) to an output (B, width of the column) for each column name."""
        outputs = self.output(self.hidden(value)).split(list(self.columns.values()), 1)
        return dict(zip(self.columns, outputs, strict=True))


class Decoder(nn.Module):
    """Mirror of the encoder: hidden layers in reverse, then a head for each kind of column."""

    def __init__(
        self,
        spec: Spec,
        *,
        latent: int,
        hidden: Sequence[int],
        frequency_width: int,
        tabular_width: int,
        pixel_width: int,
    ) -> None:
        super().__init__()
        self.features = spec.features
        self.hidden = mlp([latent, *reversed(hidden)])
        self.heads = nn.ModuleList()
        rest = dict(spec.categories)
        for name, features in spec.features.items():
            if features.grid is not None:
                self.heads.append(Head(hidden[0], pixel_width, {name: len(features.names)}))
            elif features.ordered:
                self.heads.append(Head(hidden[0], frequency_width, {name: len(features.names)}))
            else:
                rest[name] = len(features.names)
        if rest:
            self.heads.append(Head(hidden[0], tabular_width, rest))

    def forward(self, latent: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Map latents (B, d) to features in native units (B, w) and category logits (B, n).

        Reads the shift and scale of each feature from `batch`.
        """
        joined = self.hidden(latent)
        decoded: dict[str, Tensor] = {}
        for head in self.heads:
            decoded |= head(joined)
        for name, features in self.features.items():
            shift, scale = batch.get(f"{name}/shift"), batch.get(f"{name}/scale")
            decoded[name] = to_native(decoded[name], features, shift, scale)
        return decoded
