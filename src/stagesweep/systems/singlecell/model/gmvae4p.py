"""Classifier of patients that predicts three modalities of their cells from a pseudobulk."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stagesweep.base.spec import Spec
from stagesweep.base.view import Batch, View
from stagesweep.systems.singlecell.model.layers import MLP

Modality = Literal["proportions", "states", "communication"]
# Column that masks the values of a modality which are not observed.
MASKS = {"states": "types", "communication": "pairs"}


class GMVAE4P(nn.Module):
    """Predicts the label of a patient from the expression (B, g) of a pseudobulk.

    For each of `modalities` a predictor gives a mean and a variance of every value, in standard
    deviations of the training split; proportions are a softmax. An encoder turns each modality into
    `width` numbers. These are fused with weights sigma^-2 / sum sigma^-2, where sigma^2 is the mean
    predicted variance of a modality (product of Gaussian experts; Wu & Goodman 2018). States are
    pooled over types with weights softmax(a + log p): p are the predicted proportions, so absent
    types do not count, and a is learnt `attention`, or 0. The fused vector gives a latent Gaussian,
    from which two layers classify the label.

    `genes` is the number of input genes, the most variable ones of the training split;
    `standardise` converts expression to z-scores; without `uncertainty` all modalities have the
    same weight.
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
        # Mean and standard deviation of expression and of each modality, set by `adapt`.
        for name in ("expression", *self.modalities):
            self.register_buffer(f"{name}_shift", torch.zeros(sizes[name]))
            self.register_buffer(f"{name}_scale", torch.ones(sizes[name]))
        self.predictors = nn.ModuleDict(
            {n: MLP([count, *hidden], 2 * sizes[n], dropout) for n in self.modalities}
        )
        # A linear path beside the predictor, initialised to zero: with few pseudobulks the relation
        # between expression and proportions is nearly linear.
        self.linear = nn.Linear(count, self.types, bias=False)
        nn.init.zeros_(self.linear.weight)
        inputs = {n: sizes[n] for n in self.modalities} | {"states": width}
        if "states" in self.modalities:
            self.to_token = nn.Linear(sizes["states"] // self.types, width)
            self.of_type = nn.Parameter(torch.randn(self.types, width) * 0.1)
            self.to_attention = nn.Linear(width, 1)
        self.encoders = nn.ModuleDict(
            {n: MLP([inputs[n], width], width, dropout) for n in self.modalities}
        )
        self.to_latent = nn.Linear(width, 2 * width)
        self.classifier = MLP([width, width // 2], spec.labels[label], dropout)

    @torch.no_grad()
    def adapt(self, train: View) -> None:
        """Select genes and compute means and standard deviations, on the training data only."""
        for name in ("expression", *self.modalities):
            values = train[name].flatten(1)
            mask = self.observed(name, {MASKS[name]: train[MASKS[name]]} if name in MASKS else {})
            weights = torch.ones_like(values) if mask is None else mask.expand_as(values).float()
            count = weights.sum(0).clamp(min=1)
            mean = (values * weights).sum(0) / count
            variance = ((values - mean).square() * weights).sum(0) / count
            getattr(self, f"{name}_shift").copy_(mean)
            getattr(self, f"{name}_scale").copy_(variance.sqrt().clamp(min=1e-4))
        self.chosen.copy_(self.expression_scale.topk(len(self.chosen)).indices.sort().values)

    def observed(self, name: str, batch: Batch) -> Tensor | None:
        """Return the mask (B, …) of the observed values of a modality; None: all are observed."""
        if name not in MASKS:
            return None
        mask = batch[MASKS[name]]
        if name == "states":  # (B, k) -> (B, k * d)
            return mask.repeat_interleave(self.states_scale.numel() // self.types, 1)
        return mask

    def scaled(self, name: str, values: Tensor) -> Tensor:
        """Return z-scores (B, n) of values (B, …), by the training split."""
        shift, scale = getattr(self, f"{name}_shift"), getattr(self, f"{name}_scale")
        scaled: Tensor = (values.flatten(1) - shift) / scale
        return scaled

    def sample_noise(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the standard normal noise of `n` latent samples."""
        noise = torch.randn(n, self.width, generator=generator, device=generator.device)
        return {"noise": noise}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Classify the label from `expression` (B, g).

        Returns `mean`, `logvar`, `projection` (B, width), `log_assignment`, `assignment` (B, c),
        `weights` of modalities (B, m), `proportions` (B, k), and for each modality ``predicted``,
        its ``logvar`` and, if the batch has the modality, ``target`` and the mask ``observed``,
        (B, n), as ``<modality>/<name>``.
        """
        expression = batch["expression"]
        if self.standardise:
            expression = self.scaled("expression", expression).clamp(-10, 10)
        outputs: dict[str, Tensor] = {}
        for name in self.modalities:
            outputs |= self.predict(name, expression[:, self.chosen], batch)
        weights = self.fusion_weights(outputs)
        encoded = [encode(self.encoder_input(n, outputs)) for n, encode in self.encoders.items()]
        fused = (torch.stack(encoded, 1) * weights.unsqueeze(2)).sum(1)
        mean, logvar = self.to_latent(fused).float().chunk(2, 1)
        logvar = logvar.clamp(-8, 4)
        latent = mean
        if (noise := batch.get("noise")) is not None:
            latent = mean + torch.exp(0.5 * logvar) * noise
        log_assignment = self.classifier(latent).float().log_softmax(1)
        return outputs | {
            "mean": mean,
            "logvar": logvar,
            "projection": nn.functional.normalize(mean, dim=1),
            "weights": weights,
            "log_assignment": log_assignment,
            "assignment": log_assignment.exp(),
        }

    def predict(self, name: str, expression: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the prediction of a modality, and its target if the batch has one."""
        mean, logvar = self.predictors[name](expression).float().chunk(2, 1)
        found = {f"{name}/logvar": logvar.clamp(-6, 4)}
        if name == "proportions":
            found["log_proportions"] = (mean + self.linear(expression)).float().log_softmax(1)
            found["proportions"] = found["log_proportions"].exp()
            mean = self.scaled(name, found["proportions"])
        found[f"{name}/predicted"] = mean
        if name in batch:
            target = self.scaled(name, batch[name])
            mask = self.observed(name, batch)
            found[f"{name}/target"] = target
            found[f"{name}/observed"] = torch.ones_like(target) if mask is None else mask.float()
        return found

    def type_tokens(self, outputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a token of each type (B, k, width) and its attention weight (B, k)."""
        states = outputs["states/predicted"].unflatten(1, (self.types, -1))
        tokens = nn.functional.silu(self.to_token(states) + self.of_type)
        score = outputs.get("log_proportions", tokens.new_zeros(tokens.shape[:2])).detach()
        if self.attention:
            score = score + self.to_attention(tokens).squeeze(2)
        return tokens, score.softmax(1)

    def encoder_input(self, name: str, outputs: dict[str, Tensor]) -> Tensor:
        """Return the input of the encoder of a modality."""
        if name != "states":
            return outputs[f"{name}/predicted"]
        tokens, weights = self.type_tokens(outputs)
        return (tokens * weights.unsqueeze(2)).sum(1)

    def fusion_weights(self, outputs: dict[str, Tensor]) -> Tensor:
        """Return the weight of each modality in the fusion, (B, m)."""
        variances = []
        for name in self.modalities:
            variance = outputs[f"{name}/logvar"].exp()
            if name == "states":
                type_variance = variance.unflatten(1, (self.types, -1)).mean(2)
                variances.append((type_variance * self.type_tokens(outputs)[1]).sum(1))
            else:
                variances.append(variance.mean(1))
        precision = 1 / torch.stack(variances, 1)
        if not self.uncertainty:
            precision = torch.ones_like(precision)
        return precision / precision.sum(1, keepdim=True)
