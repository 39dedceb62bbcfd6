"""Whisper with a gate and a mixture of experts: LoRA adapters of its decoder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from stagesweep.base.errors import UserError
from stagesweep.base.view import Batch
from stagesweep.systems.speech.data.tokens import SpeechSpec
from stagesweep.systems.speech.model.gate import Gate
from stagesweep.systems.speech.model.lora import ExpertLinear, Route
from stagesweep.systems.speech.optional import optional_imports

# routed: each row has one expert; dense: all adapters, weighted by the gate in each layer; shared:
# all adapters as one of E times the rank; none: the base model alone.
Mixture = Literal["routed", "dense", "shared", "none"]


class MixtureWhisper(nn.Module):
    """Whisper, a gate and E experts.

    The input of the gate is the mean encoder state of a clip. An expert is a set of LoRA adapters
    of the q and v projections in the attentions of the decoder.

    In training the decoder processes each clip with K experts, in one pass of B K rows (row
    ``b K + i`` is expert i of clip b), and the loss is the weighted mean of their cross-entropies.
    K and the weights follow a curriculum over the epochs of a fit. Before the first fraction of
    `curriculum`: all experts, weighted by the gate (soft). Then: the `k` most probable, with
    renormalised probabilities (top-k soft). From the second fraction on: the most probable alone,
    with straight-through gradients for the gate (top-k hard; Bengio et al. 2013). The temperature
    of the gate decreases linearly from the first value of `temperature` to the second. `noise` is
    the standard deviation of the noise of its logits (Shazeer et al. 2017).

    In evaluation, each clip is decoded by its most probable expert.
    """

    def __init__(
        self,
        spec: SpeechSpec,
        whisper: Any,
        experts: int = 8,
        k: int = 2,
        rank: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.05,
        hidden: int = 512,
        curriculum: Sequence[float] = (0.3, 0.7),
        temperature: Sequence[float] = (2.0, 1.0),
        noise: float = 0.0,
        keep_base: bool = True,
    ) -> None:
        super().__init__()
        check_settings(experts, k, curriculum, temperature)
        self.spec, self.experts, self.k = spec, experts, k
        self.rank, self.alpha, self.noise = rank, alpha, noise
        self.curriculum, self.temperatures = tuple(curriculum), tuple(temperature)
        self.whisper = whisper
        self.gate = Gate(whisper.config.d_model, hidden, experts)
        self.route = Route()
        for name, module in adapter_targets(whisper):
            parent, _, last = name.rpartition(".")
            layer = ExpertLinear(module, self.route, experts, rank, alpha, dropout)
            setattr(whisper.get_submodule(parent), last, layer)
        self.mixture: Mixture = "routed"
        # Reference for tests and benchmarks: all experts process every clip, with equal results.
        self.all_rows = False
        # Whether `forward` also decodes in evaluation.
        self.decode_in_evaluation = False
        self._checkpointed = False
        self.begin_epoch(1, 1)
        self.keep_base = keep_base
        if not keep_base:
            whisper.register_state_dict_post_hook(_drop_base_weights)
            whisper.register_load_state_dict_post_hook(_allow_missing_base)

    # ------------------------------------------------------------- interface of fits

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set phase and temperature of epoch `epoch` (from 0) of `epochs`."""
        done = epoch / epochs
        first, second = self.curriculum
        self.phase = "soft" if done < first else "topk" if done < second else "hard"
        start, end = self.temperatures
        self.temperature = start + (end - start) * min(epoch / max(epochs - 1, 1), 1.0)

    def sample_noise(self, samples: int, generator: torch.Generator) -> Batch:
        """Draw the noise of the gate, ``gate_noise`` (B, E), for an undivided batch."""
        if not self.noise:
            return {}
        shape = (samples, self.experts)
        return {
            "gate_noise": self.noise
            * torch.randn(shape, generator=generator, device=generator.device)
        }

    @property
    def checkpointed(self) -> bool:
        """Whether activations are recomputed in the backward pass, to save memory."""
        return self._checkpointed

    @checkpointed.setter
    def checkpointed(self, wanted: bool) -> None:
        if wanted == self._checkpointed:
            return
        if wanted:
            self.whisper.activation_checkpointing_enable({"use_reentrant": False})
        else:
            self.whisper.activation_checkpointing_disable()
        self._checkpointed = wanted

    # ------------------------------------------------------------- forward

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return `gate` (B, E), log-probabilities of the experts.

        Unless the batch has only `pooled` vectors, also `logits` (B, K, T, V), `experts` (B, K),
        `weights` (B, K) with sum 1, and `pooled` (B, width). In evaluation with
        `decode_in_evaluation` also `decoded` (B, L), greedily decoded tokens, padded to maximal
        length. A column `expert` (B,) of the batch replaces the choice of the gate (K = 1).
        """
        if "mel" not in batch and "states" not in batch:
            return {"gate": self.gate(batch["pooled"]).log_softmax(1)}
        self._check_trained()
        states = self.encode(batch)
        pooled = self.pool(states, batch["frames"])
        probabilities = self.probabilities(pooled, batch.get("gate_noise"))
        experts, weights = self.choose(probabilities, batch.get("expert"))
        many = experts.shape[1]
        with self.route.active(**self._routing(experts, probabilities)):
            hidden = self.whisper.model.decoder(
                input_ids=batch["tokens"].repeat_interleave(many, 0),
                encoder_hidden_states=states.repeat_interleave(many, 0),
                use_cache=False,
            ).last_hidden_state
            logits = self.whisper.proj_out(hidden)
        found = {
            "logits": logits.unflatten(0, (len(states), many)),
            "experts": experts,
            "weights": weights,
            "gate": probabilities.clamp_min(1e-20).log(),
            "pooled": pooled,
        }
        if self.decode_in_evaluation and not self.training:
            decoded = self.decode(states, experts, probabilities)
            padding = (0, self.max_new_tokens - decoded.shape[1])
            found["decoded"] = nn.functional.pad(decoded, padding, value=self.spec.tokens.pad)
        return found

    def encode(self, batch: Batch) -> Tensor:
        """Return encoder states (B, positions, width), from `states` or `mel` of the batch.

        A frozen encoder runs without gradients.
        """
        encoder = self.whisper.model.encoder
        trained = any(parameter.requires_grad for parameter in encoder.parameters())
        if "states" in batch:
            if trained and self.training:
                raise UserError(
                    "an encoder cannot be trained on extracted states; freeze it (train: "
                    '[gate.*, "*.A.*", "*.B.*"] of the fit), or set stage.extract.states=false'
                )
            return batch["states"].float()
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            states: Tensor = encoder(batch["mel"]).last_hidden_state
        return states

    def pool(self, states: Tensor, frames: Tensor) -> Tensor:
        """Return the mean (B, width) of states (B, positions, width) without padding, in fp32."""
        last = torch.div(frames + 1, 2, rounding_mode="floor").clamp(1, states.shape[1])
        mask = torch.arange(states.shape[1], device=states.device) < last[:, None]
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        total: Tensor = torch.einsum("bpw,bp->bw", states, mask.to(states))
        return total / last[:, None]

    def probabilities(self, pooled: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return probabilities (B, E) of the experts; in training with noise and temperature."""
        logits = self.gate(pooled)
        if self.training:
            logits = logits if noise is None else logits + noise
            logits = logits / self.temperature
        probabilities: Tensor = logits.softmax(1)
        return probabilities

    def choose(self, probabilities: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the experts (B, K) of each clip and their weights (B, K)."""
        if given is not None:
            return given[:, None], torch.ones_like(probabilities[:, :1])
        if self.mixture != "routed" or not self.training:
            return probabilities.argmax(1, keepdim=True), torch.ones_like(probabilities[:, :1])
        k = self.experts if self.phase == "soft" else self.k
        found, experts = probabilities.topk(k)
        weights = found / found.sum(1, keepdim=True)
        if self.phase == "hard":
            first = torch.zeros_like(weights)
            first[:, 0] = 1.0
            weights = first + weights - weights.detach()
        if self.all_rows:
            weights = torch.zeros_like(probabilities).scatter(1, experts, weights)
            experts = torch.arange(self.experts, device=probabilities.device).expand_as(
                probabilities
            )
        return experts, weights

    def _routing(
        self, experts: Tensor, probabilities: Tensor, copies: int = 1
    ) -> dict[str, Tensor]:
        """Routing arguments of the layers: the expert of each row, or weights of all experts."""
        match self.mixture:
            case "routed":
                return {"rows": experts.flatten().repeat_interleave(copies)}
            case "dense":
                return {"weights": probabilities.repeat_interleave(copies, 0)}
            case "shared":
                return {"weights": torch.ones_like(probabilities).repeat_interleave(copies, 0)}
        return {}

    def _check_trained(self) -> None:
        """Raise UserError if weights are trained that are not saved."""
        if self.keep_base or not (self.training and torch.is_grad_enabled()):
            return
        if any(p.requires_grad for n, p in self.whisper.named_parameters() if not is_expert(n)):
            raise UserError(
                "the base weights are not saved, so they cannot be trained; freeze them "
                '(\'train: [gate.*, "*.A.*", "*.B.*"]\' of the fit), or set model.keep_base=true'
            )

    # ------------------------------------------------------------- decoding

    @torch.no_grad()
    def transcribe(self, batch: Batch, beams: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Return padded tokens (B, L) after the prefix, the expert (B,) of each clip, and its
        probabilities (B, E) of experts.

        Decoding is greedy for one beam, else beam search, by transformers' `generate`.
        """
        states = self.encode(batch)
        probabilities = self.probabilities(self.pool(states, batch["frames"]))
        experts, _ = self.choose(probabilities, batch.get("expert"))
        return self.decode(states, experts, probabilities, beams), experts[:, 0], probabilities

    @property
    def max_new_tokens(self) -> int:
        """Maximal number of decoded tokens after the prefix."""
        return int(self.whisper.config.max_target_positions) - len(self.spec.tokens.prefix)

    def decode(
        self, states: Tensor, experts: Tensor, probabilities: Tensor, beams: int = 1
    ) -> Tensor:
        """Decode encoder states; returns padded tokens (B, L) after the prefix."""
        with optional_imports():
            from transformers.generation.utils import GenerationMixin
            from transformers.modeling_outputs import BaseModelOutput
        tokens = self.spec.tokens
        prefix = torch.tensor([tokens.prefix], device=states.device).expand(len(states), -1)
        with self.route.active(**self._routing(experts, probabilities, beams)):
            found = GenerationMixin.generate(
                self.whisper,
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                decoder_input_ids=prefix,
                max_new_tokens=self.max_new_tokens,
                num_beams=beams,
                do_sample=False,
                pad_token_id=tokens.pad,
                eos_token_id=tokens.end,
                use_cache=True,
            )
        return cast(Tensor, found)[:, len(tokens.prefix) :]

    @contextmanager
    def mixed(self, mixture: Mixture) -> Iterator[None]:
        """Use another mixture within the block."""
        before, self.mixture = self.mixture, mixture
        try:
            yield
        finally:
            self.mixture = before

    # ------------------------------------------------------------- adapters

    def adapter(self, expert: int) -> dict[str, Tensor]:
        """Return the weights of an expert, with the names of peft."""
        found = {}
        for name, layer in layers(self.whisper):
            key = f"base_model.model.{name}"
            found[f"{key}.lora_A.weight"] = layer.A[expert].detach()
            found[f"{key}.lora_B.weight"] = layer.B[expert].detach()
        return found


def check_settings(
    experts: int, k: int, curriculum: Sequence[float], temperature: Sequence[float]
) -> None:
    """Raise UserError for settings that are out of range."""
    if not 1 <= k <= experts:
        raise UserError(f"model.k={k} must be between 1 and model.experts={experts}")
    if len(curriculum) != 2 or not 0 <= curriculum[0] <= curriculum[1] <= 1:
        raise UserError(
            f"model.curriculum={list(curriculum)} must be two fractions of the epochs in order: "
            "the begin of top-k soft and of top-k hard"
        )
    if len(temperature) != 2 or min(temperature) <= 0:
        raise UserError(
            f"model.temperature={list(temperature)} must be two numbers above 0: first and last"
        )


def adapter_targets(whisper: Any) -> list[tuple[str, nn.Linear]]:
    """Return the q and v projections of the decoder by name. The prefix excludes the encoder, whose
    projections have the same last names.
    """
    return [
        (name, module)
        for name, module in whisper.named_modules()
        if name.startswith("model.decoder.") and name.endswith((".q_proj", ".v_proj"))
    ]


def layers(whisper: Any) -> list[tuple[str, ExpertLinear]]:
    """Return the layers with experts by name."""
    found = whisper.named_modules()
    return [(name, module) for name, module in found if isinstance(module, ExpertLinear)]


def is_expert(name: str) -> bool:
    """Whether a name is that of an expert's parameter."""
    return ".A." in name or ".B." in name


def _drop_base_weights(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    """Drop the base weights, which are in the checkpoint of Whisper."""
    for key in [key for key in state if key.startswith(prefix) and not is_expert(key)]:
        del state[key]


def _allow_missing_base(module: nn.Module, keys: Any) -> None:
    """Do not report dropped base weights as missing."""
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if not key.startswith("whisper.") or is_expert(key)
    ]
