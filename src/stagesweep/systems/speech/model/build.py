"""Builders of models: Whisper from a checkpoint, or a small one with random weights."""

from collections.abc import Sequence
from typing import Any

from stagesweep.base.errors import UserError
from stagesweep.systems.speech.data.tokens import SpeechSpec
from stagesweep.systems.speech.model.mixture import MixtureWhisper
from stagesweep.systems.speech.optional import optional_imports


def whisper(
    spec: SpeechSpec,
    path: str,
    experts: int = 8,
    k: int = 2,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.05,
    hidden: int = 512,
    curriculum: Sequence[float] = (0.3, 0.7),
    temperature: Sequence[float] = (2.0, 1.0),
    noise: float = 0.0,
    keep_base: bool = False,
) -> MixtureWhisper:
    """Whisper from a checkpoint (name or folder), with experts on its decoder.

    The base weights are neither trained nor saved, unless `keep_base`. Raises UserError if the
    checkpoint cannot be read, or if the tokens or windows of the data do not match it.
    """
    with optional_imports():
        from transformers import WhisperForConditionalGeneration
    try:
        base: Any = WhisperForConditionalGeneration.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.path={path} is not a Whisper checkpoint ({line}); give a folder written by "
            "save_pretrained, or the name of a model that can be loaded"
        ) from error
    check_checkpoint(spec, base.config, path)
    return MixtureWhisper(
        spec, base, experts, k, rank, alpha, dropout, hidden, curriculum, temperature, noise,
        keep_base,
    )  # fmt: skip


def whisper_tiny(
    spec: SpeechSpec,
    width: int = 64,
    heads: int = 4,
    encoder_layers: int = 2,
    decoder_layers: int = 2,
    base_dropout: float = 0.0,
    experts: int = 4,
    k: int = 2,
    rank: int = 4,
    alpha: float = 8.0,
    dropout: float = 0.05,
    hidden: int = 64,
    curriculum: Sequence[float] = (0.3, 0.7),
    temperature: Sequence[float] = (2.0, 1.0),
    noise: float = 0.0,
) -> MixtureWhisper:
    """A small Whisper with random weights, sized by the data; needs no checkpoint and no network.

    The decoder has positions for the longest transcript and eight more tokens.
    """
    with optional_imports():
        from transformers import WhisperConfig, WhisperForConditionalGeneration
    tokens = spec.tokens
    config = WhisperConfig(
        vocab_size=tokens.size,
        num_mel_bins=len(spec.features["mel"].names),
        d_model=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_source_positions=spec.frames // 2,
        max_target_positions=tokens.longest + 8,
        dropout=base_dropout,
        # Whisper's 0.02 suits widths of about 1000; small models train slowly with it.
        init_std=width**-0.5,
        pad_token_id=tokens.pad,
        bos_token_id=tokens.prefix[0],
        eos_token_id=tokens.end,
        decoder_start_token_id=tokens.prefix[0],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return MixtureWhisper(
        spec, WhisperForConditionalGeneration(config), experts, k, rank, alpha, dropout, hidden,
        curriculum, temperature, noise,
    )  # fmt: skip


def check_checkpoint(spec: SpeechSpec, config: Any, path: str) -> None:
    """Raise UserError if tokens, bands or windows of the data do not match the checkpoint."""
    tokens, bands = spec.tokens, len(spec.features["mel"].names)
    remedy = f"set data.pretrained={path}"
    start = config.decoder_start_token_id
    if tokens.size > config.vocab_size:
        raise UserError(
            f"the data's tokenizer has {tokens.size} tokens, and model.path={path} has "
            f"{config.vocab_size}; {remedy}"
        )
    if (tokens.prefix[0], tokens.end) != (start, config.eos_token_id):
        raise UserError(
            f"the data's tokenizer begins and ends transcripts with tokens {tokens.prefix[0]} and "
            f"{tokens.end}, model.path={path} with {start} and {config.eos_token_id}; {remedy}"
        )
    if (bands, spec.frames) != (config.num_mel_bins, 2 * config.max_source_positions):
        raise UserError(
            f"the data has windows of {bands} bands x {spec.frames} frames, and model.path={path} "
            f"takes {config.num_mel_bins} x {2 * config.max_source_positions}; {remedy}"
        )
    if tokens.longest > config.max_target_positions:
        raise UserError(
            f"a transcript has {tokens.longest} tokens, and model.path={path} has room for "
            f"{config.max_target_positions}; leave the clip out or split it"
        )
