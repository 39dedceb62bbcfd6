"""Values of the latest steps, kept on the device until they are logged or checked."""

import torch
from torch import Tensor

from stagesweep.base.errors import NotFinite


class StepMetrics:
    """Collects loss values and gradient norms, so that no step waits for the device.

    `check` raises NotFinite for the first bad value since the last check.
    """

    def __init__(self, stage: str, terms: list[str], scaled: bool) -> None:
        self.stage = stage
        self.names = [f"loss term '{name}'" for name in terms]
        # A scaler skips the steps whose gradients overflow, so their norm may be infinite.
        self.scaled = scaled
        if not scaled:
            self.names.append("the gradient")
        # (total, weight) of the terms, (terms, 2), and gradient norm of each step.
        self.values: list[Tensor] = []
        self.norms: list[Tensor] = []

    def add(self, values: Tensor, norm: Tensor) -> None:
        """Add a step."""
        self.values.append(values)
        self.norms.append(norm)

    def check(self, epoch: int, step: int) -> None:
        """Raise NotFinite for a NaN or Inf in the steps up to `step`, in `epoch` (from 0)."""
        if not self.values:
            return
        totals = torch.stack(self.values)[:, :, 0]
        if not self.scaled:
            totals = torch.cat([totals, torch.stack(self.norms).unsqueeze(1)], 1)
        self.values.clear()
        self.norms.clear()
        for row, column in (~totals.isfinite()).nonzero().tolist():
            raise NotFinite(
                f"{self.stage}: {self.names[column]} became {totals[row, column].item()} in epoch "
                f"{epoch + 1}, step {step - len(totals) + row + 1}; lower "
                f"stage.{self.stage}.optimizer.lr, set stage.{self.stage}.clip_norm or use "
                f"hardware.precision=fp32"
            )
