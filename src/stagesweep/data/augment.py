"""Augmented copies of samples: the positives of a contrastive loss."""

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from stagesweep.data.spec import Features, Spec
from stagesweep.data.view import Batch
from stagesweep.errors import UserError


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Numbers from 0 to 1, on the device of `generator`."""
    return torch.rand(tuple(shape), generator=generator, device=generator.device)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers, on the device of `generator`."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device)


class AugmentImages:
    """Move, turn, slant, zoom and blur with noise every image of a batch, each by its own
    uniform draw.

    `shift` is in pixels, `rotate` in degrees, `shear` and `zoom` in shares of the image's size;
    each is the largest change in either direction. `noise` is the standard deviation of normal
    noise, in native units.
    """

    def __init__(
        self,
        shift: float = 1.0,
        rotate: float = 10.0,
        shear: float = 0.0,
        zoom: float = 0.0,
        noise: float = 0.05,
    ) -> None:
        self.shift = shift
        self.rotate = rotate
        self.shear = shear
        self.zoom = zoom
        self.noise = noise

    def __call__(self, batch: Batch, spec: Spec, generator: torch.Generator) -> Batch:
        """`positive/<feature>` of every feature that is an image."""
        images = {name: features for name, features in spec.features.items() if features.grid}
        if not images:
            raise UserError("augment: the data has no images (features on a grid) to augment")
        return {
            f"positive/{name}": self._augment(batch[name], features, generator)
            for name, features in images.items()
        }

    def _augment(self, pixels: Tensor, features: Features, generator: torch.Generator) -> Tensor:
        assert features.grid is not None, "only images are augmented here"
        height, width = features.grid
        draw = 2 * uniform((5, len(pixels)), generator) - 1
        angle = draw[0] * self.rotate * pi / 180
        zoom = 1 + draw[1] * self.zoom
        cosine, sine = zoom * angle.cos(), zoom * angle.sin()
        slant = draw[2] * self.shear
        # affine_grid's coordinates run from -1 to 1, so that a pixel is 2 / size
        right, down = draw[3] * self.shift * 2 / width, draw[4] * self.shift * 2 / height
        rows = [cosine, slant * cosine - sine, right, sine, slant * sine + cosine, down]
        matrix = torch.stack(rows, 1).view(-1, 2, 3)
        grid = affine_grid(matrix, [len(pixels), 1, height, width], align_corners=False)
        image = pixels.view(-1, 1, height, width)
        moved = grid_sample(image, grid, align_corners=False).view_as(pixels)
        return moved + self.noise * normal(moved.shape, generator)


class AugmentTable:
    """Disturb every continuous feature of a batch; categories stay as they are.

    A value x becomes x * (1 + `scale` * a) + `noise` * b with normal a (one for each sample) and b
    (one for each value), in standardised units, and is then hidden with probability `dropout`.
    """

    def __init__(self, noise: float = 0.05, dropout: float = 0.1, scale: float = 0.1) -> None:
        self.noise = noise
        self.dropout = dropout
        self.scale = scale

    def __call__(self, batch: Batch, spec: Spec, generator: torch.Generator) -> Batch:
        """`positive/<feature>` and `positive/<feature>/mask`, and a copy of each category."""
        positive = {f"positive/{name}": batch[name] for name in spec.categories}
        for name in spec.features:
            value = batch[name]
            factor = 1 + self.scale * normal((len(value), 1), generator)
            disturbed = value * factor + self.noise * normal(value.shape, generator)
            kept = uniform(value.shape, generator) >= self.dropout
            if (mask := batch.get(f"{name}/mask")) is not None:
                kept &= mask
            positive[f"positive/{name}"] = disturbed.masked_fill(~kept, 0)
            positive[f"positive/{name}/mask"] = kept
        return positive
