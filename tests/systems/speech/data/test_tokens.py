"""Text is encoded and decoded."""

import pytest

from stagesweep.base.errors import UserError
from stagesweep.systems.speech.data.tokens import build_normaliser, load_tokenizer, train_tokenizer

TEXTS = ["zero one two", "three four", "five six seven", "eight nine zero", "one one two"]


def test_decoding_inverts_encoding() -> None:
    tokenizer = train_tokenizer(TEXTS, 64)
    assert tokenizer.size <= 64
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert max(tokens) < tokenizer.size
        padding = [tokenizer.end, tokenizer.pad, tokenizer.pad]
        assert tokenizer.decode([*tokens, *padding]) == text
    reversed_ = train_tokenizer(TEXTS[::-1], 64)
    assert all(reversed_.encode(t) == tokenizer.encode(t) for t in TEXTS), "order does not matter"


def test_unseen_characters_are_not_an_error() -> None:
    tokens = train_tokenizer(TEXTS, 64).encode("zebra")
    assert len(tokens) > 0


def test_a_vocabulary_without_room_for_all_characters_is_an_error() -> None:
    with pytest.raises(UserError, match=r"data.vocabulary=8 is less than the \d+ characters"):
        train_tokenizer(TEXTS, 8)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: object) -> None:
    with pytest.raises(UserError, match=r"data.pretrained=.* has no tokenizer"):
        load_tokenizer(str(tmp_path), "english")


def test_text_is_scored_as_whisper_normalises_it() -> None:
    assert build_normaliser("english")("Twenty-one dogs, won't they?") == "21 dogs will not they"
    assert build_normaliser("basic")("Zero, ONE!") == "zero one"
