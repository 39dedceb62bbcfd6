"""Tokenizers (of a checkpoint, or trained on transcripts) and text normalisation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Spec
from stagesweep.systems.speech.optional import optional_imports

Normaliser = Literal["english", "basic"]
PAD, END, START, UNKNOWN = "<|pad|>", "<|endoftext|>", "<|startoftranscript|>", "<|unknown|>"


@dataclass(frozen=True)
class Tokens:
    """Properties of a tokenizer that a model needs.

    `size`: number of tokens. `prefix`: first tokens of every transcript (start; for tokenizers of
    Whisper also language, task and no timestamps). `longest`: number of decoder positions of the
    longest transcript.
    """

    size: int
    pad: int
    end: int
    prefix: tuple[int, ...]
    longest: int


@dataclass(frozen=True, kw_only=True)
class SpeechSpec(Spec):
    """`features["mel"]` has the names of the bands, `frames` is the length of a window in units of
    10 ms. Labels are `speaker` and `stratum`.
    """

    frames: int
    tokens: Tokens


class Tokenizer:
    """Encodes transcripts and decodes tokens; see `train_tokenizer` and `load_tokenizer`."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        size: int,
        pad: int,
        end: int,
        prefix: tuple[int, ...],
    ) -> None:
        self._encode, self._decode = encode, decode
        self.size, self.pad, self.end, self.prefix = size, pad, end, prefix

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a transcript, without prefix and end."""
        return self._encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens up to the end token, without special tokens."""
        own = list(tokens)
        if self.end in own:
            own = own[: own.index(self.end)]
        special = {self.pad, self.end, *self.prefix}
        return self._decode([token for token in own if token not in special]).strip()


def train_tokenizer(transcripts: Sequence[str], size: int) -> Tokenizer:
    """Train a byte-pair encoding of at most `size` tokens (Sennrich et al. 2016).

    Characters that are in no transcript become the token for unknown.
    """
    with optional_imports():
        from tokenizers import Tokenizer as Bpe
        from tokenizers import decoders, models, pre_tokenizers, trainers
    bpe: Any = Bpe(models.BPE(unk_token=UNKNOWN))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    special = [PAD, END, START, UNKNOWN]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(sorted(transcripts), trainer)
    found = Tokenizer(
        encode=lambda text: list(bpe.encode(text).ids),
        decode=lambda tokens: str(bpe.decode(tokens)),
        size=bpe.get_vocab_size(),
        pad=0,
        end=1,
        prefix=(2,),
    )
    if found.size > size:
        raise UserError(
            f"data.vocabulary={size} is less than the {found.size} characters and special tokens "
            "of the transcripts; increase it"
        )
    return found


def load_tokenizer(path: str, language: str, task: str = "transcribe") -> Tokenizer:
    """Load the tokenizer of a Whisper checkpoint (folder or name); UserError if it has none."""
    with optional_imports():
        from transformers import AutoTokenizer
    try:
        own: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.pretrained={path} has no tokenizer ({line}); give a folder with the files of a "
            "Whisper checkpoint, or its name"
        ) from error
    if own.eos_token_id is None or START not in own.get_vocab():
        raise UserError(
            f"data.pretrained={path}: not a tokenizer of Whisper ({START} is missing); "
            "give a Whisper checkpoint"
        )
    if hasattr(own, "set_prefix_tokens") and f"<|{task}|>" in own.get_vocab():
        own.set_prefix_tokens(language=language, task=task, predict_timestamps=False)
    start = own.convert_tokens_to_ids(START)
    prefix = tuple(getattr(own, "prefix_tokens", ())) or (start,)
    return Tokenizer(
        encode=lambda text: list(own.encode(text, add_special_tokens=False)),
        decode=lambda tokens: str(own.decode(tokens, skip_special_tokens=True)),
        size=len(own),
        pad=own.pad_token_id if own.pad_token_id is not None else own.eos_token_id,
        end=own.eos_token_id,
        prefix=prefix,
    )


def build_normaliser(kind: Normaliser) -> Callable[[str], str]:
    """Whisper's normalisation of text for scoring (Radford et al. 2022, appendix C): ``basic``, or
    ``english``, which also writes numbers as digits and expands contractions.
    """
    with optional_imports():
        from transformers.models.whisper.english_normalizer import (
            BasicTextNormalizer,
            EnglishTextNormalizer,
        )
    english: Any = EnglishTextNormalizer
    own: Any = english({}) if kind == "english" else BasicTextNormalizer()
    return lambda text: str(own(text)).strip()
