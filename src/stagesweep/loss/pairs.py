"""Which samples of a batch belong together."""

from torch import Tensor

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch


def same_label(batch: Batch, term: str, label: str) -> Tensor:
    """Matrix (B, B), True where two samples share a known label (0 or more), diagonal included."""
    if label not in batch:
        raise UserError(f"loss.{term}.label={label}: the data has no such column")
    labels = batch[label]
    return (labels[:, None] == labels) & (labels >= 0)
