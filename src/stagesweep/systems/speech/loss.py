"""Loss terms of the mixture of experts: transcripts, and the gate."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stagesweep.base.view import Batch
from stagesweep.systems.speech.data.windows import IGNORED


class TokenCrossEntropy(nn.Module):
    """Cross-entropy of the tokens of a transcript, averaged over the experts of a clip by weight.

    ``average: sample`` is a mean over clips of means over tokens; ``token`` is a mean over all
    tokens, so long transcripts have more weight. Clips without a transcript are ignored.
    """

    def __init__(self, average: Literal["sample", "token"] = "sample") -> None:
        super().__init__()
        self.average = average

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum over clips (or tokens), and their number."""
        logits, labels = outputs["logits"].float(), batch["labels"]
        repeated = labels[:, None].expand(-1, logits.shape[1], -1)
        losses = cross_entropy(
            logits.flatten(0, 2), repeated.flatten(), ignore_index=IGNORED, reduction="none"
        )
        sums = losses.view(repeated.shape).sum(2)  # (B, K)
        tokens = (labels != IGNORED).sum(1)
        totals = (outputs["weights"].float() * sums).sum(1)
        if self.average == "token":
            return totals.sum(), tokens.sum().to(totals)
        return (totals / tokens.clamp(min=1)).sum(), (tokens > 0).sum().to(totals)


class GateTarget(nn.Module):
    """Cross-entropy of the gate with the clusters of clips.

    ``targets: hard`` uses the column `cluster` (B,); ``soft`` uses the membership probabilities
    `soft` (B, E).
    """

    def __init__(self, targets: Literal["hard", "soft"] = "soft") -> None:
        super().__init__()
        self.targets = targets

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum over clips, and their number."""
        logs = outputs["gate"].float()
        if self.targets == "hard":
            total = -logs.gather(1, batch["cluster"][:, None]).sum()
        else:
            # Inactive experts have target 0, and 0 times their log-probability may be NaN.
            total = -torch.where(batch["soft"] > 0, batch["soft"] * logs, 0.0).sum()
        return total, total.new_tensor(len(logs))


class Balance(nn.Module):
    """Load-balancing loss over experts.

    ``switch`` (minimum 1): E Σ f_e P_e, where f_e is the share of clips whose most probable expert
    is e, and P_e the mean probability of e (Fedus et al. 2022, eq. 4). ``kl`` (minimum 0):
    KL(uniform || P).

    It is not a mean over samples, so it needs the undivided batch.
    """

    whole_batch = ("gate",)

    def __init__(self, kind: Literal["switch", "kl"] = "switch") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the value of the batch times the number of clips, and that number."""
        probabilities = outputs["gate"].float().exp()
        samples, experts = probabilities.shape
        mean = probabilities.mean(0)
        if self.kind == "kl":
            value = -(mean.clamp_min(1e-12) * experts).log().mean()
        else:
            used = torch.nn.functional.one_hot(probabilities.argmax(1), experts).float().mean(0)
            value = experts * (used * mean).sum()
        return value * samples, value.new_tensor(samples)


class GateEntropy(nn.Module):
    """Negative entropy of the gate in nats; minimising it keeps the gate uncertain."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum over clips, and their number."""
        logs = outputs["gate"].float()
        total = (logs.exp() * logs).sum()
        return total, total.new_tensor(len(logs))
