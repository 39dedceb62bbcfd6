"""Augmented copies of samples: the positives of a contrastive loss."""

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features, Spec
from stagesweep.base.view import Batch


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform random numbers in [0, 1), on the device of `generator`."""
    return torch.rand(tuple(shape), generator=generator, device=generator.device)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal random numbers, on the device of `generator`."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device)


class AugmentImages:
    """Deform every image of a batch, each with its own random parameters.

    Bounds of uniform draws in [-bound, bound]: `shift` in pixels; `rotate` in degrees; `shear`
    and `stretch` (height and width independently) as fractions of the image; `stroke`, the
    thickness: a pixel p becomes p ** exp(stroke * u).

    Standard deviations of normal draws: `elastic`, the displacement in pixels of a 3 x 3 grid of
    control points (Simard et al. 2003, with a coarse grid in place of a smoothed field), and
    `noise`, added to each pixel.
    """

    def __init__(
        self,
        shift: float = 1.0,
        rotate: float = 10.0,
        shear: float = 0.0,
        stretch: float = 0.0,
        elastic: float = 0.0,
        stroke: float = 0.0,
        noise: float = 0.05,
    ) -> None:
        self.shift = shift
        self.rotate = rotate
        self.shear = shear
        self.stretch = stretch
        self.elastic = elastic
        self.stroke = stroke
        self.noise = noise

    def __call__(self, batch: Batch, spec: Spec, generator: torch.Generator) -> Batch:
        """Return `positive/<feature>` for every feature with a grid; pixels are in 0..1."""
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
        draw = 2 * uniform((7, len(pixels)), generator) - 1
        # The coordinates of affine_grid run from -1 to 1, so a pixel is 2 / size.
        pixel = torch.tensor([2 / width, 2 / height], device=pixels.device)
        grid = affine_grid(
            self._matrix(draw, pixel), [len(pixels), 1, height, width], align_corners=False
        )
        control_points = self.elastic * normal((len(pixels), 2, 3, 3), generator)
        displacement = interpolate(
            control_points, (height, width), mode="bilinear", align_corners=True
        )
        grid = grid + displacement.permute(0, 2, 3, 1) * pixel
        image = pixels.view(-1, 1, height, width)
        moved = grid_sample(image, grid, align_corners=False).view_as(pixels)
        # Interpolation can give values slightly below 0.
        stroked = moved.clamp(0, 1) ** torch.exp(self.stroke * draw[6]).unsqueeze(1)
        return stroked + self.noise * normal(pixels.shape, generator)

    def _matrix(self, draw: Tensor, pixel: Tensor) -> Tensor:
        """Affine matrices (B, 2, 3): stretch, then shear, then rotation, then shift."""
        angle = draw[0] * self.rotate * pi / 180
        cosine, sine = angle.cos(), angle.sin()
        slant = draw[1] * self.shear
        wide, high = 1 + draw[2] * self.stretch, 1 + draw[3] * self.stretch
        right, down = draw[4] * self.shift * pixel[0], draw[5] * self.shift * pixel[1]
        first = [wide * cosine, high * (slant * cosine - sine), right]
        second = [wide * sine, high * (slant * sine + cosine), down]
        return torch.stack(first + second, 1).view(-1, 2, 3)


class AugmentTable:
    """Add noise to every continuous feature of a batch; categories are unchanged.

    A value x becomes x * (1 + `scale` * a) + `noise` * b, in standardised units. a and b are
    standard normal, a drawn for each sample, b for each value. Each value is then masked with
    probability `dropout`.
    """

    def __init__(self, noise: float = 0.05, dropout: float = 0.1, scale: float = 0.1) -> None:
        self.noise = noise
        self.dropout = dropout
        self.scale = scale

    def __call__(self, batch: Batch, spec: Spec, generator: torch.Generator) -> Batch:
        """Return `positive/<feature>`, `positive/<feature>/mask` and a copy of each category."""
        positive = {f"positive/{name}": batch[name] for name in spec.categories}
        for name in spec.features:
            value = batch[name]
            factor = 1 + self.scale * normal((len(value), 1), generator)
            noisy = value * factor + self.noise * normal(value.shape, generator)
            kept = uniform(value.shape, generator) >= self.dropout
            if (mask := batch.get(f"{name}/mask")) is not None:
                kept &= mask
            positive[f"positive/{name}"] = noisy.masked_fill(~kept, 0)
            positive[f"positive/{name}/mask"] = kept
        return positive
