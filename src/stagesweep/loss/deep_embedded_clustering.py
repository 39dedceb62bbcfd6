"""Deep embedded clustering (DEC): soft assignments learn from a sharper version of themselves."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stagesweep.base.view import Batch


def target_distribution(assignment: Tensor) -> Tensor:
    """Target distribution (N, k) for the assignments (N, k) of a full data set.

    Squared, divided by the cluster frequencies, normalised by row (Xie et al. 2016, eq. 3).
    """
    raised = assignment.square() / assignment.sum(0)
    return raised / raised.sum(1, keepdim=True)


class DeepEmbeddedClustering(nn.Module):
    """KL(P || Q), a sum over samples (Xie et al. 2016, eq. 2).

    P is computed over the full training set every `every` epochs and held fixed in between. Where
    the batch has positives, they have the P of their samples as target, too, which makes clusters
    invariant to augmentation (Guo et al. 2018, DEC with data augmentation). The sum is then over
    both views.
    """

    reports = ("label_change",)
    # Without centres from an init_clusters stage there is nothing to sharpen.
    needs_cluster_centres = True
    target: Tensor
    labels: Tensor

    def __init__(self, every: int = 10) -> None:
        super().__init__()
        self.every = every
        # Their sizes are known at the first refresh only, so they are saved as extra state.
        self.register_buffer("target", torch.empty(0, 0), persistent=False)
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64), persistent=False)

    def refresh(self, epoch: int, predict: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        """Recompute P when it is due.

        Returns `label_change`, the share of samples that changed cluster since the last refresh of
        this stage.
        """
        if epoch % self.every and len(self.target):
            return {}
        device = self.labels.device
        assignment = predict()["assignment"].detach().float().to(device)
        labels = assignment.argmax(1)
        first = epoch == 0 or len(labels) != len(self.labels)
        change = {} if first else {"label_change": (labels != self.labels).float().mean().item()}
        self.target, self.labels = target_distribution(assignment), labels
        return change

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples (and views), and their number; `index` gives their rows of P."""
        target = self.target[batch["index"]]
        views = [outputs[name] for name in ("assignment", "positive/assignment") if name in outputs]
        parts = [torch.xlogy(target, target) - target * view.float().log() for view in views]
        total = torch.stack(parts).sum()
        return total, total.new_full((), len(views) * len(target))

    def get_extra_state(self) -> dict[str, Tensor]:
        """State for a checkpoint: P and the last labels."""
        return {"target": self.target, "labels": self.labels}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore P and the last labels, on the device of the term."""
        device = self.labels.device
        self.target, self.labels = state["target"].to(device), state["labels"].to(device)
