"""Whisper with a gate and a mixture of experts, which are LoRA adapters of its decoder."""

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

# routed: rows of the chosen experts; dense: the adapters of all, weighted by the gate within each
# layer; shared: all of them as one adapter of E times the rank; none: the base alone.
Mixture = Literal["routed", "dense", "shared", "none"]
MIXTURES: tuple[Mixture, ...] = ("routed", "dense", "shared", "none")
# Globs of what is not the base; `train` of a fit names some of them.
EXPERTS, GATE = ("*.A.*", "*.B.*"), ("gate.*",)


class MixtureWhisper(nn.Module):
    """Whisper, a gate and E experts.

    The gate sees the mean encoder state of a clip. An expert is a LoRA adapter set on the q and v
    projections of the decoder's attentions (of the encoder's none).

    In training the decoder hears a clip once for each of its K experts, in one pass of B K rows
    (row ``b K + i`` is expert i of clip b), and the loss weighs their cross-entropies. K and the
    weights follow a curriculum over the epochs of a fit: below the first fraction of `curriculum`
    all experts, weighted by the gate (soft); then the `k` likeliest, their probabilities made to
    add up to one (top-k soft); from the second fraction on the likeliest counts alone, while the
    gate learns from all k by a straight-through estimate (top-k hard; Bengio et al. 2013). The
    temperature of the gate falls linearly from the first number of `temperature` to the second,
    `noise` is the standard deviation of what is added to its scores (Shazeer et al. 2017).

    In evaluation, and when decoding, a clip is told by its likeliest expert.
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
        check(experts, k, curriculum, temperature)
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
        # The slow reference: every expert hears every clip, the weights are the same.
        self.all_rows = False
        # Whether clips are also decoded when the model is evaluated.
        self.decodes = False
        self._checkpointed = False
        self.begin_epoch(1, 1)
        self.keep_base = keep_base
        if not keep_base:
            whisper.register_state_dict_post_hook(_leave_out_base)
            whisper.register_load_state_dict_post_hook(_base_is_there)

    # ------------------------------------------------------------- what fits ask for

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Where the curriculum stands in epoch `epoch` (from 0) of `epochs`, and at its end."""
        done = epoch / epochs
        first, second = self.curriculum
        self.phase = "soft" if done < first else "topk" if done < second else "hard"
        start, end = self.temperatures
        self.temperature = start + (end - start) * min(epoch / max(epochs - 1, 1), 1.0)

    def sample_noise(self, samples: int, generator: torch.Generator) -> Batch:
        """What is drawn for an undivided batch: the gate's noise (B, E)."""
        if not self.noise:
            return {}
        shape = (samples, self.experts)
        return {
            "gate_noise": self.noise
            * torch.randn(shape, generator=generator, device=generator.device)
        }

    @property
    def checkpointed(self) -> bool:
        """Whether activations are computed again in the backward pass, to save memory."""
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
        """`gate` (B, E), log-probabilities of the experts, and for batches that have more than
        `pooled` vectors: `logits` (B, K, T, V), `experts` (B, K) and `weights` (B, K), which add up
        to one, and `pooled` (B, width). In evaluation with `decodes` also `heard` (B, L), the
        tokens that are decoded greedily, padded to the most there can be.

        Where the batch says which `expert` (B,) a clip has, it has that one (K = 1).
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
        if self.decodes and not self.training:
            heard = self.decode(states, experts, probabilities)
            rest = (0, self.room - heard.shape[1])
            found["heard"] = nn.functional.pad(heard, rest, value=self.spec.tokens.pad)
        return found

    def encode(self, batch: Batch) -> Tensor:
        """Encoder states (B, positions, width): those of the batch, or of its `mel`.

        No gradient is kept for an encoder that is not trained.
        """
        encoder = self.whisper.model.encoder
        trained = any(parameter.requires_grad for parameter in encoder.parameters())
        if "states" in batch:
            if trained and self.training:
                raise UserError(
                    "an encoder cannot be trained on states that it has left; freeze it (train: "
                    '[gate.*, "*.A.*", "*.B.*"] of the fit), or set stage.extract.states=false'
                )
            return batch["states"].float()
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            states: Tensor = encoder(batch["mel"]).last_hidden_state
        return states

    def pool(self, states: Tensor, frames: Tensor) -> Tensor:
        """The mean (B, width) of the states (B, positions, width) that are not of padding, fp32."""
        last = torch.div(frames + 1, 2, rounding_mode="floor").clamp(1, states.shape[1])
        heard = torch.arange(states.shape[1], device=states.device) < last[:, None]
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        total: Tensor = torch.einsum("bpw,bp->bw", states, heard.to(states))
        return total / last[:, None]

    def probabilities(self, pooled: Tensor, noise: Tensor | None = None) -> Tensor:
        """Probabilities (B, E) of the experts; in training at the temperature of the epoch."""
        scores = self.gate(pooled)
        if self.training:
            scores = scores if noise is None else scores + noise
            scores = scores / self.temperature
        probabilities: Tensor = scores.softmax(1)
        return probabilities

    def choose(self, probabilities: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The experts (B, K) that hear each clip, and what each weighs (B, K)."""
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
        """What the layers are told: for each row its expert, or how much of each."""
        match self.mixture:
            case "routed":
                return {"rows": experts.flatten().repeat_interleave(copies)}
            case "dense":
                return {"weights": probabilities.repeat_interleave(copies, 0)}
            case "shared":
                return {"weights": torch.ones_like(probabilities).repeat_interleave(copies, 0)}
        return {}

    def _check_trained(self) -> None:
        """Raise UserError for training what is not saved."""
        if self.keep_base or not (self.training and torch.is_grad_enabled()):
            return
        if any(p.requires_grad for n, p in self.whisper.named_parameters() if not is_expert(n)):
            raise UserError(
                "the base of this model is not saved, and so cannot be trained; freeze it "
                '(\'train: [gate.*, "*.A.*", "*.B.*"]\' of the fit), or set model.keep_base=true'
            )

    # ------------------------------------------------------------- decoding

    @torch.no_grad()
    def transcribe(self, batch: Batch, beams: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L) after the prefix, padded, the expert (B,) that told each clip, and the
        gate's probabilities (B, E).

        Greedy for one beam, else beam search, by transformers' `generate`.
        """
        states = self.encode(batch)
        probabilities = self.probabilities(self.pool(states, batch["frames"]))
        experts, _ = self.choose(probabilities, batch.get("expert"))
        return self.decode(states, experts, probabilities, beams), experts[:, 0], probabilities

    @property
    def room(self) -> int:
        """How many tokens the decoder can write after the prefix."""
        return int(self.whisper.config.max_target_positions) - len(self.spec.tokens.prefix)

    def decode(
        self, states: Tensor, experts: Tensor, probabilities: Tensor, beams: int = 1
    ) -> Tensor:
        """Tokens (B, L) after the prefix that are heard in encoder states, padded."""
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
                max_new_tokens=self.room,
                num_beams=beams,
                do_sample=False,
                pad_token_id=tokens.pad,
                eos_token_id=tokens.end,
                use_cache=True,
            )
        return cast(Tensor, found)[:, len(tokens.prefix) :]

    @contextmanager
    def mixed(self, mixture: Mixture) -> Iterator[None]:
        """Mix the experts in another way within the block."""
        before, self.mixture = self.mixture, mixture
        try:
            yield
        finally:
            self.mixture = before

    # ------------------------------------------------------------- adapters

    def adapter(self, expert: int) -> dict[str, Tensor]:
        """The weights of an expert by the names that peft gives them."""
        found = {}
        for name, layer in layers(self.whisper):
            key = f"base_model.model.{name}"
            found[f"{key}.lora_A.weight"] = layer.A[expert].detach()
            found[f"{key}.lora_B.weight"] = layer.B[expert].detach()
        return found


def check(experts: int, k: int, curriculum: Sequence[float], temperature: Sequence[float]) -> None:
    """Raise UserError for numbers that do not go together."""
    if not 1 <= k <= experts:
        raise UserError(f"model.k={k} must be between 1 and model.experts={experts}")
    if len(curriculum) != 2 or not 0 <= curriculum[0] <= curriculum[1] <= 1:
        raise UserError(
            f"model.curriculum={list(curriculum)} must be two fractions of the epochs in order: "
            "where top-k soft begins, and where top-k hard does"
        )
    if len(temperature) != 2 or min(temperature) <= 0:
        raise UserError(
            f"model.temperature={list(temperature)} must be two numbers above 0: first and last"
        )


def adapter_targets(whisper: Any) -> list[tuple[str, nn.Linear]]:
    """The q and v projections of the decoder, by name. A match by the last name alone would find
    those of the encoder as well.
    """
    return [
        (name, module)
        for name, module in whisper.named_modules()
        if name.startswith("model.decoder.") and name.endswith((".q_proj", ".v_proj"))
    ]


def layers(whisper: Any) -> list[tuple[str, ExpertLinear]]:
    """The layers that have experts, by name."""
    found = whisper.named_modules()
    return [(name, module) for name, module in found if isinstance(module, ExpertLinear)]


def is_expert(name: str) -> bool:
    """Whether a parameter of that name is an expert's."""
    return ".A." in name or ".B." in name


def _leave_out_base(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    """Keep of Whisper's weights those of the experts alone: the rest is in its checkpoint."""
    for key in [key for key in state if key.startswith(prefix) and not is_expert(key)]:
        del state[key]


def _base_is_there(module: nn.Module, keys: Any) -> None:
    """What `_leave_out_base` leaves out is not missing."""
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if not key.startswith("whisper.") or is_expert(key)
    ]
