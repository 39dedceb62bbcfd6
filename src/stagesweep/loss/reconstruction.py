"""Reconstruction error of the decoder."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch


def standardised(native: Tensor, batch: Batch, name: str) -> Tensor:
    """Convert decoded values (B, w) from native units to those of the model's input, in fp32."""
    shift, scale = batch.get(f"{name}/shift"), batch.get(f"{name}/scale")
    value = native.float()
    return value if shift is None or scale is None else (value - shift) / scale


class Reconstruction(nn.Module):
    """Squared error of standardised features plus cross-entropy of categories.

    A sum over the observed values of a sample and over samples. `weights` are factors by feature
    or category; the default is 1.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = dict(weights or {})

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples of the error of every decoded column, and the number of samples."""
        decoded = [name for name in outputs if name in batch]
        if unknown := sorted(self.weights.keys() - set(decoded)):
            raise UserError(
                f"loss.reconstruction.weights names '{unknown[0]}', which the model does not "
                f"decode: choose from {', '.join(decoded)}"
            )
        total = outputs["mean"].new_zeros((), dtype=torch.float32)
        for name in decoded:
            total = total + self.weights.get(name, 1.0) * self._error(outputs[name], batch, name)
        return total, total.new_full((), len(outputs["mean"]))

    def _error(self, output: Tensor, batch: Batch, name: str) -> Tensor:
        target = batch[name]
        if not target.is_floating_point():  # a category, where 0 means unknown
            return cross_entropy(output.float(), target, ignore_index=0, reduction="sum")
        error = (standardised(output, batch, name) - target).square()
        mask = batch.get(f"{name}/mask")
        return error.sum() if mask is None else error.masked_fill(~mask, 0).sum()
