"""Text as tokens and back: the tokenizer of a checkpoint, or one trained on the transcripts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Spec
from stagesweep.systems.speech.extra import needed

Normaliser = Literal["english", "basic"]
PAD, END, START, UNKNOWN = "<|pad|>", "<|endoftext|>", "<|startoftranscript|>", "<|unknown|>"


@dataclass(frozen=True)
class Tokens:
    """What a model needs to know of a tokenizer.

    `size` is the number of tokens, `prefix` what every transcript begins with for the decoder
    (start, and with Whisper's own tokenizers language, task and no timestamps), `longest` the
    number of decoder positions of the longest transcript.
    """

    size: int
    pad: int
    end: int
    prefix: tuple[int, ...]
    longest: int


@dataclass(frozen=True, kw_only=True)
class SpeechSpec(Spec):
    """`features["mel"]` names the bands of a window of `frames` of 10 ms; labels are `speaker` and
    `stratum`.
    """

    frames: int
    tokens: Tokens


class Tokenizer:
    """Encodes transcripts and decodes tokens; made by `trained` or `pretrained`."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        size: int,
        pad: int,
        end: int,
        prefix: tuple[int, ...],
        about: str,
    ) -> None:
        self._encode, self._decode = encode, decode
        self.size, self.pad, self.end, self.prefix, self.about = size, pad, end, prefix, about

    def encode(self, text: str) -> list[int]:
        """The tokens of a transcript, without those that begin and end it."""
        return self._encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, up to the one that ends it; special tokens are left out."""
        own = list(tokens)
        if self.end in own:
            own = own[: own.index(self.end)]
        special = {self.pad, self.end, *self.prefix}
        return self._decode([token for token in own if token not in special]).strip()


def trained(transcripts: Sequence[str], size: int) -> Tokenizer:
    """A byte-pair encoding of `size` tokens at most (Sennrich et al. 2016), trained on transcripts.

    Characters that no transcript has become one token, for unknown.
    """
    with needed():
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
        about=bpe.to_str(),
    )
    if found.size > size:
        raise UserError(
            f"data.vocabulary={size} is less than the {found.size} characters and special tokens "
            "of the transcripts; raise it"
        )
    return found


def pretrained(path: str, language: str, task: str = "transcribe") -> Tokenizer:
    """The tokenizer of a Whisper checkpoint, a folder or a name; raises UserError without one."""
    with needed():
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
            f"data.pretrained={path}: its tokenizer is not one of Whisper, it has no {START}"
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
        about=f"{path}/{len(own)}/{prefix}",
    )


def normaliser(kind: Normaliser) -> Callable[[str], str]:
    """Whisper's normalisation of text before it is scored (Radford et al. 2022, appendix C):
    ``english``, which also writes numbers in digits and spells out contractions, or ``basic``.
    """
    with needed():
        from transformers.models.whisper.english_normalizer import (
            BasicTextNormalizer,
            EnglishTextNormalizer,
        )
    english: Any = EnglishTextNormalizer
    own: Any = english({}) if kind == "english" else BasicTextNormalizer()
    return lambda text: str(own(text)).strip()
