"""Deep embedded clustering: soft assignments are drawn towards a sharper version of themselves."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stagesweep.data.view import Batch


def sharpen(assignment: Tensor, frequency: Tensor) -> Tensor:
    """Target distribution (N, k) of assignments (N, k) (Xie et al. 2016, eq. 3).

    `frequency` (k,) is the sum of the assignments over the full training set.
    """
    raised = assignment.square() / frequency
    return raised / raised.sum(1, keepdim=True)


class Clustering(nn.Module):
    """KL(P || Q), a sum over samples (Xie et al. 2016, eq. 2).

    P is computed over the full training set every `every` epochs and held in between. In
    evaluation mode, where samples need not be training samples, P comes from their own
    assignments and the training set's cluster frequencies.
    """

    target: Tensor
    frequency: Tensor
    labels: Tensor

    def __init__(self, every: int = 10) -> None:
        super().__init__()
        self.every = every
        # Their sizes are known at the first refresh, so they travel as extra state.
        self.register_buffer("target", torch.empty(0, 0), persistent=False)
        self.register_buffer("frequency", torch.empty(0), persistent=False)
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64), persistent=False)

    def refresh(self, epoch: int, predict: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
        """Renew P when it is due; returns `label_change`, the share of samples that changed
        cluster since the last refresh of this stage.
        """
        if epoch % self.every and len(self.target):
            return {}
        assignment = predict()["assignment"].detach().float()
        labels = assignment.argmax(1)
        first = epoch == 0 or len(labels) != len(self.labels)
        change = {} if first else {"label_change": (labels != self.labels).float().mean().item()}
        self.frequency, self.labels = assignment.sum(0), labels
        self.target = sharpen(assignment, self.frequency)
        return change

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over samples; `index` of the batch says which rows of P they have."""
        assignment = outputs["assignment"].float()
        if self.training:
            target = self.target[batch["index"]]
        else:
            target = sharpen(assignment, self.frequency).detach()
        total = (torch.xlogy(target, target) - target * assignment.log()).sum()
        return total, total.new_tensor(len(assignment))

    def get_extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: P, the cluster frequencies and the last labels."""
        return {"target": self.target, "frequency": self.frequency, "labels": self.labels}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Take up what `get_extra_state` gave, on the device the term is on."""
        for name, value in state.items():
            setattr(self, name, value.to(getattr(self, name).device))
