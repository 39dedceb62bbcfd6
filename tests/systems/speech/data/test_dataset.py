"""Tables of clips are read, split and cut into windows; each fault is a one-line error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from stagesweep.base.errors import UserError
from stagesweep.systems.speech.data.dataset import Columns, Speech
from stagesweep.systems.speech.data.windows import IGNORED

Write = Callable[..., tuple[Path, Columns]]
SETTINGS: dict[str, Any] = {"bands": 20, "seconds": 0.4, "vocabulary": 48, "normaliser": "basic"}


def read(written: tuple[Path, Columns], **settings: Any) -> Speech:
    path, columns = written
    return Speech(str(path), columns, **(SETTINGS | settings))


def test_clips_of_a_table_become_batches(write_clips: Write) -> None:
    data = read(write_clips())
    speakers = {split: set(data.split(split)["speaker"].tolist()) for split in data.splits}
    assert sum(len(data.split(split)) for split in data.splits) == 24
    assert sum(map(len, speakers.values())) == 8, "splits share no speaker"
    view = data.split("train")
    (batch,) = view.batches(100)
    n = len(view)
    assert batch["mel"].shape == (n, 20, 40)
    assert batch["tokens"].shape == batch["labels"].shape == (n, data.spec.tokens.longest)
    for row in range(n):
        clip = data.clips.iloc[int(batch["clip"][row])]
        seconds = clip["seconds"]
        assert int(batch["frames"][row]) == min(int(np.ceil(seconds * 100 - 1e-6)) + 2, 40 - 1)
        assert data.label_names["stratum"][int(batch["stratum"][row])] == clip["stratum"]
        labels = batch["labels"][row][batch["labels"][row] != IGNORED]
        assert labels[-1] == data.tokenizer.end
        assert data.tokenizer.decode(labels.tolist()) == clip["reference"]
        # The input of the decoder is the transcript so far.
        assert batch["tokens"][row][0] == data.spec.tokens.prefix[0]
        assert torch.equal(batch["tokens"][row][1 : len(labels)], labels[:-1])


def test_json_lines_are_read_like_csv(write_clips: Write, tmp_path: Path) -> None:
    path, columns = write_clips()
    rows = pd.read_csv(path).to_dict("records")
    lines = tmp_path / "table.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read((path, columns)), read((lines, columns))
    for split in first.splits:
        assert first.ids(split).tolist() == second.ids(split).tolist()
    # A string may contain other line separators.
    lines.write_text(
        "".join(json.dumps({**r, "note": "a\u2028b\x85"}, ensure_ascii=False) + "\n" for r in rows)
    )
    assert len(read((lines, columns)).clips) == 24
    lines.write_bytes(b'{"path": "\xe9"}')
    with pytest.raises(UserError, match=r"table.jsonl is not a readable text file \(UTF-8\)"):
        read((lines, columns))
    lines.write_text("{broken\n")
    with pytest.raises(UserError, match=r"table.jsonl, line 1 is not valid JSON"):
        read((lines, columns))


def test_a_share_of_train_is_kept_and_strata_are_dropped(write_clips: Write) -> None:
    whole, half = read(write_clips()), read(write_clips(), fraction=0.5)
    assert len(half.split("train")) == round(len(whole.split("train")) / 2)
    assert len(half.split("test")) == len(whole.split("test"))
    assert read(write_clips(), drop=["als"]).label_names["stratum"] == ["stroke"]


def test_speakers_may_be_held_out(write_clips: Write) -> None:
    data = read(write_clips(), hold_out=["s3"])
    names = data.label_names["speaker"]
    assert {names[code] for code in data.split("test")["speaker"]} == {"s3"}
    assert all(names[code] != "s3" for code in data.split("train")["speaker"])
    assert sum(len(data.split(split)) for split in data.splits) == 24
    with pytest.raises(UserError, match=r"data.hold_out: no speaker 'x'.*there are s0, s1"):
        read(write_clips(), hold_out=["x"])


def test_a_long_clip_is_refused_cut_or_split(write_clips: Write, tmp_path: Path) -> None:
    written = write_clips()
    rate, wave = 8000, np.random.default_rng(0).normal(0, 0.1, 8000)
    soundfile.write(tmp_path / "5.wav", wave, rate)
    message = (
        r"line 7: a clip of 1.00 s is longer than the window of 0.4 s \(1 in all\); "
        r"set data.long=cut to cut off its end, data.long=split"
    )
    with pytest.raises(UserError, match=message):
        read(written)
    cut = read(written, long="cut")
    assert [len(windows) for windows in cut.windows] == [1] * 24
    parts = read(written, long="split")
    assert [len(windows) for windows in parts.windows] == [1] * 5 + [3] + [1] * 18
    seen = {split: parts.split(split)["clip"].tolist().count(5) for split in parts.splits}
    assert sorted(seen.values()) in ([0, 0, 0], [0, 0, 3])
    assert seen["train"] == 0, "the words of each window are unknown"
    for split in ("val", "test"):
        if seen[split]:
            (batch,) = parts.split(split).batches(100)
            assert (batch["labels"][batch["clip"] == 5] == IGNORED).all()


def test_split_clips_alone_are_an_error(write_clips: Write) -> None:
    with pytest.raises(
        UserError, match=r"every training clip is longer than .* of 0.1 s.*long=cut"
    ):
        read(write_clips(), seconds=0.1, long="split")


def broken(kind: str, folder: Path) -> Callable[[pd.DataFrame], Any]:
    """Break the second clip in some way."""

    def change(table: pd.DataFrame) -> None:
        match kind:
            case "missing":
                (folder / "1.wav").unlink()
            case "broken":
                (folder / "1.wav").write_bytes(b"RIFF no audio")
            case "silent":
                soundfile.write(folder / "1.wav", np.zeros(2000), 8000)
            case "empty":
                table.loc[1, "transcript"] = " ... "
            case "absent":
                table.loc[1, "transcript"] = None

    return change


FAULTS = {
    "missing": r"1.wav: the file does not exist",
    "broken": r"1.wav: not a readable audio file",
    "silent": r"1.wav: the clip is silent",
    "empty": "the transcript is empty",
    "absent": "the transcript is empty",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_an_unusable_clip_is_named_and_left_out_only_on_request(
    write_clips: Write, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    written = write_clips(broken(kind, tmp_path))
    message = rf"table.csv, line 3: .*{FAULTS[kind]}.*data.on_error=skip"
    with pytest.raises(UserError, match=message):
        read(written)
    with caplog.at_level("WARNING"):
        data = read(written, on_error="skip")
    assert len(data.clips) == 23
    assert "line 3" in caplog.text


def test_other_faults_of_a_table_are_named(write_clips: Write) -> None:
    with pytest.raises(UserError, match=r"no column 'wav' in .*; the nearest is .*data.columns"):
        read(write_clips(path="wav"))
    with pytest.raises(UserError, match=r"'dev' in the split column, "
                                        r"line 2 of .*table.csv, is not a split"):  # fmt: skip
        read(write_clips(lambda t: t.assign(part="dev"), split="part"))
    with pytest.raises(UserError, match=r"stratum 'als' has one speaker"):
        read(write_clips(lambda t: t.assign(etiology=["als", *["stroke"] * 7] * 3)))
    with pytest.raises(UserError, match=r"no speaker in line 4 \(1 in all\)"):
        read(write_clips(lambda t: t.assign(speaker=["a", "b", None, *["c"] * 21])))
    with pytest.raises(UserError, match=r"data.fractions=.* must be positive and add up to 1"):
        read(write_clips(), fractions=(0.5, 0.1, 0.1))


def test_a_speaker_in_two_splits_is_an_error_unless_allowed(write_clips: Write) -> None:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(part=["train", "val", "test"] * 8)

    message = r"speaker 's0' is in the splits train and .*, so evaluation is not on unseen speakers"
    with pytest.raises(UserError, match=message):
        read(write_clips(change, split="part"))
    data = read(write_clips(change, split="part"), shared_speakers=True)
    assert [len(data.split(name)) for name in ("train", "val", "test")] == [8, 8, 8]


def test_features_replace_audio(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(10, 30, 12)
    offsets = np.concatenate([[0], lengths.cumsum()])
    frames = random.normal(size=(offsets[-1], 13)).astype(np.float16)
    np.savez(tmp_path / "f.npz", cepstra=frames, offsets=offsets)
    table = pd.DataFrame(
        {"transcript": ["yes", "no"] * 6, "row": range(12), "speaker": [n // 2 for n in range(12)]}
    )
    table.to_csv(tmp_path / "t.csv", index=False)
    columns = Columns("transcript", row="row", speaker="speaker")
    data = read((tmp_path / "t.csv", columns), features=str(tmp_path / "f.npz"))
    (batch,) = data.split("train").batches(50)
    assert batch["mel"].shape[1:] == (13, 40)
    first = int(batch["clip"][0])
    own = frames[offsets[first] : offsets[first + 1]].astype(np.float32)
    expected = (own - own.mean(0)) / own.std(0)
    np.testing.assert_allclose(batch["mel"][0, :, : len(own)].T, expected, atol=2e-2)
    assert (batch["mel"][0, :, len(own) :] == 0).all()
    table.assign(row=99).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(UserError, match=r"line 2: row 99 is not in .*f.npz, which has 12"):
        read((tmp_path / "t.csv", columns), features=str(tmp_path / "f.npz"))


FRAMES, OFFSETS = np.zeros((60, 13), np.float32), np.array([0, 20, 40, 60])
WRONG = {
    "shape": (FRAMES[0], OFFSETS, "must be finite numbers"),
    "nan": (FRAMES * np.nan, OFFSETS, "must be finite numbers"),
    "text": (FRAMES.astype(str), OFFSETS, "must be finite numbers"),
    "fractions": (FRAMES, OFFSETS + 0.5, "offsets must be integers that rise from 0 to 60"),
    "order": (FRAMES, OFFSETS[::-1].copy(), "offsets must be integers"),
    "beyond": (FRAMES, OFFSETS * 2, "offsets must be integers"),
    "few": (FRAMES, OFFSETS[:1], "offsets must be integers"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_invalid_features_are_refused(tmp_path: Path, kind: str) -> None:
    frames, offsets, text = WRONG[kind]
    np.savez(tmp_path / "f.npz", cepstra=frames, offsets=offsets)
    table = pd.DataFrame({"transcript": ["one"] * 3, "row": ["0", "1", "2"]})
    with pytest.raises(UserError, match=f"data.features=.*f.npz: .*{text}"):
        Speech(table, Columns("transcript", row="row"), features=str(tmp_path / "f.npz"))


def test_windows_are_read_one_by_one(small: Speech) -> None:
    view = small.split("train")
    part = view.take(torch.tensor([3, 1]))
    (batch,) = part.batches(9)
    (whole,) = view.batches(999)
    assert torch.equal(batch["mel"], whole["mel"][[3, 1]])
    assert torch.equal(batch["clip"], whole["clip"][[3, 1]])
    marked = part.with_columns({"expert": torch.tensor([1, 0])})
    assert next(iter(marked.batches(1)))["expert"].tolist() == [1]
    digests = {view.samples.digest(number) for number in range(len(view))}
    assert len(digests) == len(view)
