"""Classifier of patients that reads three views of their cells out of a pseudobulk."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from stagesweep.base.spec import Spec
from stagesweep.base.view import Batch, View

Modality = Literal["proportions", "states", "communication"]
# What says which values of a modality are observed.
MASKS = {"states": "types", "communication": "pairs"}


class GMVAE4P(nn.Module):
    """Tells a patient's label from the expression (B, g) of a pseudobulk.

    A predictor for each of `modalities` gives, in standard deviations of the training split, a mean
    and a variance of every value; proportions are a softmax. Encoders make `width` numbers of each
    modality, which are fused with weights sigma^-2 / sum sigma^-2, sigma^2 being the mean predicted
    variance of a modality (a product of Gaussian experts; Wu & Goodman 2018). States are pooled
    over types with weights softmax(a + log p): p are the predicted proportions, so that absent
    types do not count, and a is learnt `attention`, or else 0. What was fused gives a latent
    Gaussian, from which two layers tell the label.

    `genes` is the number of genes that are read, the most variable ones of the training split;
    `standardise` gives z-scores of the expression; without `uncertainty` modalities weigh the same.
    """

    chosen: Tensor
    expression_scale: Tensor
    states_scale: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        label: str = "condition",
        hidden: Sequence[int] = (512, 256),
        width: int = 128,
        dropout: float = 0.2,
        genes: int | None = None,
        modalities: Sequence[Modality] = ("proportions", "states", "communication"),
        standardise: bool = True,
        uncertainty: bool = True,
        attention: bool = True,
    ) -> None:
        super().__init__()
        self.modalities, self.width = tuple(modalities), width
        self.standardise, self.uncertainty, self.attention = standardise, uncertainty, attention
        sizes = {name: len(features.names) for name, features in spec.features.items()}
        self.types = sizes["proportions"]
        count = min(genes or sizes["expression"], sizes["expression"])
        self.register_buffer("chosen", torch.arange(count))
        # Of expression and of each modality: what `adapt` finds.
        for name in ("expression", *self.modalities):
            self.register_buffer(f"{name}_shift", torch.zeros(sizes[name]))
            self.register_buffer(f"{name}_scale", torch.ones(sizes[name]))
        self.predictors = nn.ModuleDict(
            {n: Predictor([count, *hidden], 2 * sizes[n], dropout) for n in self.modalities}
        )
        # Beside it, from zero: what few pseudobulks tell of proportions is near to linear.
        self.linear = nn.Linear(count, self.types, bias=False)
        nn.init.zeros_(self.linear.weight)
        inputs = {n: sizes[n] for n in self.modalities} | {"states": width}
        if "states" in self.modalities:
            self.to_token = nn.Linear(sizes["states"] // self.types, width)
            self.of_type = nn.Parameter(torch.randn(self.types, width) * 0.1)
            self.to_attention = nn.Linear(width, 1)
        self.encoders = nn.ModuleDict(
            {n: Predictor([inputs[n], width], width, dropout) for n in self.modalities}
        )
        self.to_latent = nn.Linear(width, 2 * width)
        self.classifier = Predictor([width, width // 2], spec.labels[label], dropout)

    @torch.no_grad()
    def adapt(self, train: View) -> None:
        """Choose genes and learn means and deviations, from what the model is fitted to alone."""
        for name in ("expression", *self.modalities):
            values = train[name].flatten(1)
            seen = self.observed(name, {MASKS[name]: train[MASKS[name]]} if name in MASKS else {})
            weights = torch.ones_like(values) if seen is None else seen.expand_as(values).float()
            count = weights.sum(0).clamp(min=1)
            mean = (values * weights).sum(0) / count
            variance = ((values - mean).square() * weights).sum(0) / count
            getattr(self, f"{name}_shift").copy_(mean)
            getattr(self, f"{name}_scale").copy_(variance.sqrt().clamp(min=1e-4))
        self.chosen.copy_(self.expression_scale.topk(len(self.chosen)).indices.sort().values)

    def observed(self, name: str, batch: Batch) -> Tensor | None:
        """Which values (B, …) of a modality are observed; None: all of them."""
        if name not in MASKS:
            return None
        mask = batch[MASKS[name]]
        if name == "states":  # (B, k) -> (B, k * d)
            return mask.repeat_interleave(self.states_scale.numel() // self.types, 1)
        return mask

    def scaled(self, name: str, values: Tensor) -> Tensor:
        """Values (B, …) in standard deviations of the training split, (B, n)."""
        shift, scale = getattr(self, f"{name}_shift"), getattr(self, f"{name}_scale")
        scaled: Tensor = (values.flatten(1) - shift) / scale
        return scaled

    def sample_noise(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the standard normal numbers that turn `n` latent distributions into samples."""
        noise = torch.randn(n, self.width, generator=generator, device=generator.device)
        return {"noise": noise}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Read `expression` (B, g) and tell the label.

        Returns `mean`, `logvar`, `projection` (B, width), `log_assignment`, `assignment` (B, c),
        `weights` of modalities (B, m), `proportions` (B, k), and of each modality what is
        ``predicted``, its ``logvar`` and, where the batch has it, the ``target`` and whether it is
        ``observed``, (B, n), as ``<modality>/<name>``.
        """
        expression = batch["expression"]
        if self.standardise:
            expression = self.scaled("expression", expression).clamp(-10, 10)
        outputs: dict[str, Tensor] = {}
        for name in self.modalities:
            outputs |= self.predict(name, expression[:, self.chosen], batch)
        weights = self.trust(outputs)
        encoded = [encode(self.view_of(n, outputs)) for n, encode in self.encoders.items()]
        fused = (torch.stack(encoded, 1) * weights.unsqueeze(2)).sum(1)
        mean, logvar = self.to_latent(fused).float().chunk(2, 1)
        logvar = logvar.clamp(-8, 4)
        latent = mean
        if (noise := batch.get("noise")) is not None:
            latent = mean + torch.exp(0.5 * logvar) * noise
        told = self.classifier(latent).float().log_softmax(1)
        return outputs | {
            "mean": mean,
            "logvar": logvar,
            "projection": nn.functional.normalize(mean, dim=1),
            "weights": weights,
            "log_assignment": told,
            "assignment": told.exp(),
        }

    def predict(self, name: str, expression: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What a predictor says of its modality, and what it should have said."""
        mean, logvar = self.predictors[name](expression).float().chunk(2, 1)
        found = {f"{name}/logvar": logvar.clamp(-6, 4)}
        if name == "proportions":
            found["log_proportions"] = (mean + self.linear(expression)).float().log_softmax(1)
            found["proportions"] = found["log_proportions"].exp()
            mean = self.scaled(name, found["proportions"])
        found[f"{name}/predicted"] = mean
        if name in batch:
            target = self.scaled(name, batch[name])
            seen = self.observed(name, batch)
            found[f"{name}/target"] = target
            found[f"{name}/observed"] = torch.ones_like(target) if seen is None else seen.float()
        return found

    def attended(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A token of each type (B, k, width), and how much each counts (B, k)."""
        states = outputs["states/predicted"].unflatten(1, (self.types, -1))
        tokens = nn.functional.silu(self.to_token(states) + self.of_type)
        score = outputs.get("log_proportions", tokens.new_zeros(tokens.shape[:2])).detach()
        if self.attention:
            score = score + self.to_attention(tokens).squeeze(2)
        return tokens, score.softmax(1)

    def view_of(self, name: str, outputs: dict[str, Tensor]) -> Tensor:
        """What the encoder of a modality reads."""
        if name != "states":
            return outputs[f"{name}/predicted"]
        tokens, share = self.attended(outputs)
        return (tokens * share.unsqueeze(2)).sum(1)

    def trust(self, outputs: dict[str, Tensor]) -> Tensor:
        """The weight of each modality in the fusion, (B, m)."""
        variances = []
        for name in self.modalities:
            variance = outputs[f"{name}/logvar"].exp()
            if name == "states":
                of_type = variance.unflatten(1, (self.types, -1)).mean(2)
                variances.append((of_type * self.attended(outputs)[1]).sum(1))
            else:
                variances.append(variance.mean(1))
        precision = 1 / torch.stack(variances, 1)
        if not self.uncertainty:
            precision = torch.ones_like(precision)
        return precision / precision.sum(1, keepdim=True)


class Predictor(nn.Module):
    """Linear, normalised, bent layers, and a last linear one of `out` outputs."""

    def __init__(self, widths: Sequence[int], out: int, dropout: float) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.SiLU(), nn.Dropout(dropout))
            for a, b in pairwise(widths)
        ]
        self.hidden = nn.Sequential(*blocks)
        self.out = nn.Linear(widths[-1], out)

    def forward(self, values: Tensor) -> Tensor:
        """(B, widths[0]) -> (B, out)."""
        result: Tensor = self.out(self.hidden(values))
        return result
