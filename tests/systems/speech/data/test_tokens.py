"""Text becomes tokens and comes back."""

import pytest

from stagesweep.base.errors import UserError
from stagesweep.systems.speech.data.tokens import normaliser, pretrained, trained

TEXTS = ["zero one two", "three four", "five six seven", "eight nine zero", "one one two"]


def test_a_trained_tokenizer_gives_back_what_it_is_given() -> None:
    tokenizer = trained(TEXTS, 64)
    assert tokenizer.size <= 64
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert max(tokens) < tokenizer.size
        padding = [tokenizer.end, tokenizer.pad, tokenizer.pad]
        assert tokenizer.decode([*tokens, *padding]) == text
    assert trained(TEXTS[::-1], 64).about == tokenizer.about, "the order of texts plays no part"


def test_what_was_never_seen_is_unknown_but_no_error() -> None:
    tokens = trained(TEXTS, 64).encode("zebra")
    assert len(tokens) > 0


def test_a_vocabulary_without_room_for_all_characters_is_an_error() -> None:
    with pytest.raises(UserError, match=r"data.vocabulary=8 is less than the \d+ characters"):
        trained(TEXTS, 8)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: object) -> None:
    with pytest.raises(UserError, match=r"data.pretrained=.* has no tokenizer"):
        pretrained(str(tmp_path), "english")


def test_text_is_scored_as_whisper_normalises_it() -> None:
    assert normaliser("english")("Twenty-one dogs, won't they?") == "21 dogs will not they"
    assert normaliser("basic")("Zero, ONE!") == "zero one"
