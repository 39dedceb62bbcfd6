"""The loss terms of the mixture: tokens by the experts, and what keeps the gate in order."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch
from stagesweep.systems.speech.data.windows import IGNORED


class TokenCrossEntropy(nn.Module):
    """Cross-entropy of the tokens, of each clip the mean over its experts as they weigh.

    With ``average: sample`` it is a mean over clips of means over their tokens; with ``token`` a
    mean over all tokens, in which long transcripts count for more. Clips without a transcript count
    for nothing.
    """

    def __init__(self, average: Literal["sample", "token"] = "sample") -> None:
        super().__init__()
        if average not in ("sample", "token"):
            raise UserError(f"average={average} of a token loss is sample or token")
        self.average = average

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over clips (or tokens), and their number."""
        logits, labels = outputs["logits"].float(), batch["labels"]
        many = logits.shape[1]
        every = labels[:, None].expand(-1, many, -1)
        losses = cross_entropy(
            logits.flatten(0, 2), every.flatten(), ignore_index=IGNORED, reduction="none"
        )
        sums = losses.view(every.shape).sum(2)  # (B, K)
        tokens = (labels != IGNORED).sum(1)
        totals = (outputs["weights"].float() * sums).sum(1)
        if self.average == "token":
            return totals.sum(), tokens.sum().to(totals)
        return (totals / tokens.clamp(min=1)).sum(), (tokens > 0).sum().to(totals)


class GateTarget(nn.Module):
    """Cross-entropy of the gate with the cluster of each clip: the column `cluster` (B,), or with
    ``targets: soft`` the shares of all clusters, `soft` (B, E).
    """

    def __init__(self, targets: Literal["hard", "soft"] = "soft") -> None:
        super().__init__()
        if targets not in ("hard", "soft"):
            raise UserError(f"targets={targets} of the gate's loss are hard or soft")
        self.targets = targets

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over clips, and their number."""
        logs = outputs["gate"].float()
        if self.targets == "hard":
            total = -logs.gather(1, batch["cluster"][:, None]).sum()
        else:
            # An expert that is not active has a share of 0, and a logarithm that is no number.
            total = -torch.where(batch["soft"] > 0, batch["soft"] * logs, 0.0).sum()
        return total, total.new_tensor(len(logs))


class Balance(nn.Module):
    """That all experts be used: ``switch``, E Σ f_e P_e with f the shares of clips whose likeliest
    expert is e and P the mean probabilities (Fedus et al. 2022, eq. 4); or ``kl``, the divergence
    of P from uniform, KL(uniform || P). Both are 1 and 0 at their least.

    Needs the whole batch: a mean of means over its parts is another number.
    """

    whole_batch = ("gate",)

    def __init__(self, kind: Literal["switch", "kl"] = "switch") -> None:
        super().__init__()
        if kind not in ("switch", "kl"):
            raise UserError(f"kind={kind} of the balance loss is switch or kl")
        self.kind = kind

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's value times its clips, and their number."""
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
    """The negative entropy of the gate in nats: what lowers it lets the gate stay in doubt."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over clips, and their number."""
        logs = outputs["gate"].float()
        total = (logs.exp() * logs).sum()
        return total, total.new_tensor(len(logs))
