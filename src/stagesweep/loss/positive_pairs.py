"""Positive pairs of a batch, for losses that compare samples."""

from torch import Tensor

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch


def positive_pairs(batch: Batch, term: str, label: str) -> Tensor:
    """Mask (B, B), True where two samples share a known label (0 or more), diagonal included.

    Raises UserError, naming the loss `term`, when the batch has no column `label`.
    """
    if label not in batch:
        raise UserError(f"loss.{term}.label={label}: the data has no such column")
    labels = batch[label]
    return (labels[:, None] == labels) & (labels >= 0)
