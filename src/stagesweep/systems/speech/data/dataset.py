"""Recorded speech of many speakers, from a table of clips."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from stagesweep.base.errors import UserError
from stagesweep.base.spec import Features
from stagesweep.data.arrays import read_arrays
from stagesweep.data.table import require_columns
from stagesweep.systems.speech.data import audio, split
from stagesweep.systems.speech.data.features import (
    RATE,
    Cepstra,
    Clips,
    Files,
    Heard,
    LogMel,
    check_cepstra,
    folder,
)
from stagesweep.systems.speech.data.split import SPLITS, Codes
from stagesweep.systems.speech.data.table import read_clips
from stagesweep.systems.speech.data.tokens import (
    Normaliser,
    SpeechSpec,
    Tokenizer,
    Tokens,
    normaliser,
    pretrained,
    trained,
)
from stagesweep.systems.speech.data.windows import Samples, SpeechView
from stagesweep.systems.speech.extra import needed

log = logging.getLogger(__name__)

# How a clip is told that lasts longer than a window of the model.
Long = Literal["refuse", "cut", "split"]


@dataclass(frozen=True)
class Columns:
    """Which column of the table is what; a null column is as good as absent.

    `path` is the audio file, relative to the table; `row` the number of a clip in a file of
    features instead; `stratum` what speakers are told apart by (etiology, accent).
    """

    transcript: str
    path: str | None = None
    row: str | None = None
    speaker: str | None = None
    stratum: str | None = None
    split: str | None = None

    def used(self) -> dict[str, str]:
        """Our name of each column -> its name in the table."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: column for name, column in named.items() if column}


class Speech:
    """Clips with transcripts, split by speaker and ready for a model.

    Columns of a batch: `mel` (B, bands, frames), log-mel features; `frames` (B,), how many of them
    are not padding; `tokens` (B, T), what the decoder reads; `labels` (B, T), what it is to write,
    -100 where nothing; `speaker` and `stratum` (B,), codes; `clip` (B,), the clip's row in
    `clips`. Of a clip that is longer than a window and split, each window is a sample without
    labels.
    """

    spec: SpeechSpec
    # Label -> the names its codes stand for, over all splits.
    label_names: dict[str, list[str]]

    def __init__(
        self,
        path: str | pd.DataFrame,
        columns: Columns,
        features: str | None = None,
        pretrained: str | None = None,
        language: str = "english",
        normaliser: Normaliser = "english",
        vocabulary: int = 256,
        bands: int = 80,
        rate: int = 16000,
        seconds: float = 30.0,
        long: Long = "refuse",
        on_error: Literal["refuse", "skip"] = "refuse",
        drop: Sequence[str] = (),
        fraction: float = 1.0,
        fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
        split_by: Literal["speaker", "clip"] = "speaker",
        hold_out: Sequence[str] = (),
        shared_speakers: bool = False,
        split_seed: int = 0,
        source: Clips | None = None,
    ) -> None:
        """Prepare a .csv or .jsonl table of clips, or one in memory.

        `features` is an .npz file of features (arrays `cepstra` or `features`, and `offsets`) in
        place of audio. `pretrained` is a Whisper checkpoint whose tokenizer and features are used;
        without one a tokenizer of `vocabulary` tokens is trained on the transcripts of train, and
        features have `bands` bands of audio at `rate` Hz, in windows of `seconds`. A `long` clip is
        refused, cut, or split into windows; what is missing, broken, silent or has no transcript is
        an error, or left out (`on_error`). Strata in `drop` are left out. `fraction` is the
        stratified share of train that is kept. Splits are those of the table where it has them; of
        speakers in `hold_out` all is tested, and what of others was to be tested is learnt from.
        `source` gives the audio of clips that are in no files. Raises UserError naming what is
        wrong.
        """
        self.source_name = path if isinstance(path, str) else "the table"
        self._read_table(path, columns, drop)
        self.normalise = _normaliser(normaliser)
        faults = self._empty()
        window = _window(pretrained, bands, rate, seconds)
        if features is not None:
            self._cepstra(features)
            window = LogMel(self._bands, window.rate, round(seconds * RATE))
        elif source is None:
            faults |= self._files()
        else:
            self._clips = source
            self.clips["seconds"] = [source.seconds(row) for row in range(len(self.clips))]
        self._refuse(faults, on_error)
        self.pieces = self._pieces(long, window.frames / RATE)
        rows = self._split(fractions, split_by, hold_out, shared_speakers, split_seed)
        kept = split.stratified(self._codes["stratum"][rows["train"]], fraction, split_seed)
        self._rows = rows | {"train": rows["train"][kept]}
        if all(len(self.pieces[row]) > 1 for row in self._rows["train"]):
            raise UserError(
                f"{self.source_name}: every training clip is longer than the "
                f"{window.frames / RATE:g} s that the model hears, and windows of a clip are never "
                "trained on; raise data.seconds, or set data.long=cut"
            )
        self._tokenize(pretrained, language, vocabulary)
        self._describe(window)
        self._heard: Heard | Cepstra
        if features is not None:
            self._heard = self._given
        else:
            self._heard = Heard(self._clips, window, folder())

    # ------------------------------------------------------------- what stages use

    def split(self, name: str) -> SpeechView:
        """The windows of a split; raises UserError naming the splits there are.

        Of training clips that would be several windows there are none.
        """
        if name not in self._rows:
            raise UserError(f"no split {name!r}; there are {', '.join(self._rows)}")
        own = [self.pieces[row] for row in self._rows[name]]
        pieces = [
            each for windows in own if name != "train" or len(windows) == 1 for each in windows
        ]
        clip = np.array([row for row, _, _ in pieces], np.int64)
        texts = [self._tokens[row] if len(self.pieces[row]) == 1 else [] for row in clip]
        columns = {key: torch.from_numpy(code[clip]) for key, code in self._codes.items()}
        samples = Samples(self._heard, pieces, texts, self.spec)
        return SpeechView(samples, {**columns, "clip": torch.from_numpy(clip)})

    @property
    def splits(self) -> list[str]:
        """The names of the splits there are."""
        return list(self._rows)

    def ids(self, split: str) -> NDArray[np.str_]:
        """What the clip of each window of a split is called, (n,)."""
        names: NDArray[np.str_] = self.clips["id"].to_numpy(str)[self.split(split)["clip"].numpy()]
        return names

    def about_tokens(self) -> str:
        """What tokens follow from: the same for tokenizers that encode alike."""
        return self.tokenizer.about

    # ------------------------------------------------------------- how it is made

    def _read_table(self, path: str | pd.DataFrame, columns: Columns, drop: Sequence[str]) -> None:
        """Our columns of the table: transcript, speaker, stratum, split, id, line, path or row."""
        table = read_clips(path) if isinstance(path, str) else path
        used = columns.used()
        require_columns(table, used.values(), self.source_name)
        own = pd.DataFrame({name: table[column].astype("string") for name, column in used.items()})
        own["line"] = np.arange(len(own)) + (1 if str(path).endswith(".jsonl") else 2)
        own["id"] = own["path"] if columns.path else [f"clip {n}" for n in range(len(own))]
        if columns.speaker is None:
            own["speaker"] = own["id"]
        if columns.stratum is None:
            own["stratum"] = "all"
        for name in ("speaker", "stratum"):
            if len(missing := own[own[name].isna()]):
                raise UserError(
                    f"{self.source_name}: no {name} in line {missing['line'].iloc[0]} "
                    f"({len(missing)} in all); mend it or data.columns.{name}"
                )
        self._place = Path(path).parent if isinstance(path, str) else Path()
        self._has_split = columns.split is not None
        self._has_speaker = columns.speaker is not None
        self.clips = own[~own["stratum"].isin(list(drop))].reset_index(drop=True)
        if not len(self.clips):
            raise UserError(f"{self.source_name}: data.drop={list(drop)} leaves no clips")

    def _empty(self) -> dict[int, str]:
        """Clips whose transcript has no word left when it is normalised."""
        said = self.clips["transcript"].fillna("").map(self.normalise)
        self.clips["reference"] = said
        return {int(row): "its transcript is empty" for row in np.flatnonzero(said == "")}

    def _files(self) -> dict[int, str]:
        """Look at the audio files; what is wrong with any."""
        if "path" not in self.clips:
            raise UserError(
                "data.columns.path is not set: name the column of audio files, or give features "
                "instead of audio with data.features and data.columns.row"
            )
        missing = self.clips["path"].isna()
        paths = [self._place / str(path) for path in self.clips["path"].fillna("")]
        place = hashlib.sha256(str(self._place.absolute()).encode()).hexdigest()[:16]
        sounds = audio.survey(paths, folder() / f"survey_{place}.json")
        self._clips = Files(paths, sounds)
        self.clips["seconds"] = [self._clips.seconds(row) for row in range(len(self.clips))]
        faults = {row: f"{paths[row]}: {s.fault}" for row, s in enumerate(sounds) if s.fault}
        return faults | {int(r): "no audio file is named" for r in np.flatnonzero(missing)}

    def _cepstra(self, path: str) -> None:
        """Read a file of features and find each clip in it."""
        if "row" not in self.clips:
            raise UserError(f"data.features={path} needs data.columns.row: the column of its rows")
        found = read_arrays(Path(path))
        frames = found.get("cepstra", found.get("features"))
        if frames is None or "offsets" not in found:
            have = ", ".join(found)
            raise UserError(
                f"data.features={path} needs the arrays 'cepstra' or 'features', and 'offsets'; "
                f"it has {have}"
            )
        offsets = check_cepstra(frames, found["offsets"], path)
        rows = pd.to_numeric(self.clips["row"], errors="coerce").fillna(-1).to_numpy(np.int64)
        for row in np.flatnonzero((rows < 0) | (rows >= len(offsets) - 1))[:1]:
            raise UserError(
                f"{self.source_name}, line {self.clips['line'][row]}: row "
                f"{self.clips['row'][row]} is not in {path}, which has {len(offsets) - 1}"
            )
        self._given, self._bands = Cepstra(frames, offsets, rows), frames.shape[1]
        self.clips["seconds"] = (offsets[rows + 1] - offsets[rows]) / RATE

    def _refuse(self, faults: Mapping[int, str], on_error: str) -> None:
        """Raise UserError for the first clip that cannot be used, or leave all of them out."""
        if on_error not in ("refuse", "skip"):
            raise UserError(f"data.on_error={on_error} is refuse or skip")
        told = [f"line {self.clips['line'][row]}: {faults[row]}" for row in sorted(faults)]
        if told and on_error == "refuse":
            more = f" (and {len(told) - 1} more clips)" if len(told) > 1 else ""
            raise UserError(
                f"{self.source_name}, {told[0]}{more}; mend it, or leave such clips out with "
                "data.on_error=skip"
            )
        for line in told[:20]:
            log.warning("left out: %s, %s", self.source_name, line)
        if len(told) > 20:
            log.warning("left out: %d more clips of %s", len(told) - 20, self.source_name)
        keep = np.setdiff1d(np.arange(len(self.clips)), sorted(faults))
        if not len(keep):
            raise UserError(f"{self.source_name} has no clip that can be used: {told[0]}")
        self._keep(keep)

    def _keep(self, rows: Codes) -> None:
        self.clips = self.clips.iloc[rows].reset_index(drop=True)
        clips = getattr(self, "_clips", None)
        if isinstance(clips, Files):
            self._clips = Files([clips.paths[r] for r in rows], [clips.sounds[r] for r in rows])
        elif clips is not None:
            self._clips = _Some(clips, rows)
        if hasattr(self, "_given"):
            own = self._given
            self._given = Cepstra(own.frames, own.offsets, own.rows[rows])

    def _pieces(self, long: str, window: float) -> list[list[tuple[int, float, float]]]:
        """The windows (clip, from, to) of each clip; raises UserError for a long one, by choice."""
        if long not in ("refuse", "cut", "split"):
            raise UserError(f"data.long={long} is refuse, cut or split")
        seconds = self.clips["seconds"].to_numpy(float)
        over = np.flatnonzero(seconds > window + 0.5 / RATE)
        if len(over) and long == "refuse":
            row = over[0]
            raise UserError(
                f"{self.source_name}, line {self.clips['line'][row]}: a clip of {seconds[row]:.2f} "
                f"s is longer than the {window:g} s that the model hears ({len(over)} in all); "
                "set data.long=cut to lose its end, data.long=split to hear it in windows, or a "
                "larger data.seconds"
            )
        if len(over):
            done = "cut off" if long == "cut" else "heard in several windows, never trained on"
            log.warning("%d clips longer than %g s are %s", len(over), window, done)
        pieces: list[list[tuple[int, float, float]]] = []
        for row, length in enumerate(seconds):
            if long == "split" and row in set(over):
                count = int(np.ceil(length / window))
                edges = np.linspace(0, length, count + 1)
                pieces.append([(row, a, b) for a, b in pairwise(edges)])
            else:
                pieces.append([(row, 0.0, min(length, window))])
        return pieces

    def _split(
        self,
        fractions: tuple[float, float, float],
        split_by: str,
        hold_out: Sequence[str],
        shared: bool,
        seed: int,
    ) -> dict[str, Codes]:
        """The clips of each split."""
        if split_by not in ("speaker", "clip"):
            raise UserError(f"data.split_by={split_by} is speaker or clip")
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise UserError(f"data.fractions={list(fractions)} must be positive and add up to 1")
        self._code()
        speaker, stratum = self._codes["speaker"], self._codes["stratum"]
        shares = dict(zip(SPLITS, fractions, strict=True))
        if self._has_split:
            lines = self.clips["line"].tolist()
            values = self.clips["split"].fillna("").tolist()
            rows = split.by_column(values, lines, self.source_name)
        elif split_by == "clip" or not self._has_speaker:
            rows = split.by_clip(stratum, shares, seed)
        else:
            rows = split.by_speaker(
                speaker, stratum, shares, seed, self.label_names["stratum"], bool(hold_out)
            )
        if hold_out:
            rows = self._held_out(rows, hold_out)
        names = self.label_names["speaker"]
        if self._has_split and not shared and not hold_out:
            split.apart(rows, speaker, names, self.source_name)
        return rows

    def _held_out(self, rows: Mapping[str, Codes], names: Sequence[str]) -> dict[str, Codes]:
        """All clips of some speakers as test, the others' as they were, their test in train."""
        known = self.label_names["speaker"]
        for name in names:
            if name not in known:
                raise UserError(
                    f"data.hold_out: no speaker {name!r} in {self.source_name}; there are "
                    f"{', '.join(known[:10])}"
                )
        held = np.isin(self._codes["speaker"], [known.index(name) for name in names])
        if held.all():
            raise UserError("data.hold_out names every speaker; leave some to learn from")
        train = np.sort(np.concatenate([rows["train"], rows["test"]]))
        return {
            "train": train[~held[train]],
            "val": rows["val"][~held[rows["val"]]],
            "test": np.flatnonzero(held),
        }

    def _code(self) -> None:
        self.label_names, self._codes = {}, {}
        for name in ("speaker", "stratum"):
            found = self.clips[name].astype("category").cat
            self.label_names[name] = [str(each) for each in found.categories]
            self._codes[name] = found.codes.to_numpy(np.int64, copy=True)

    def _tokenize(self, checkpoint: str | None, language: str, size: int) -> None:
        """Encode every transcript; the tokenizer is that of the checkpoint, or trained on train."""
        texts = self.clips["transcript"].fillna("").astype(str).tolist()
        if checkpoint is None:
            own = [self.clips["reference"][row] for row in self._rows["train"]]
            self.tokenizer: Tokenizer = trained(own, size)
            texts = self.clips["reference"].tolist()
        else:
            self.tokenizer = pretrained(checkpoint, language)
        self._tokens = [self.tokenizer.encode(text) for text in texts]

    def _describe(self, window: LogMel) -> None:
        """The spec: bands, frames, tokens and how many speakers and strata there are."""
        own = self.tokenizer
        longest = max(map(len, self._tokens)) + len(own.prefix)
        self.spec = SpeechSpec(
            {"mel": Features(tuple(f"mel {n}" for n in range(window.bands)), ordered=True)},
            labels={name: len(known) for name, known in self.label_names.items()},
            frames=window.frames,
            tokens=Tokens(own.size, own.pad, own.end, own.prefix, longest),
        )
        counts = ", ".join(f"{len(rows)} {name}" for name, rows in self._rows.items())
        speakers, strata = (len(self.label_names[name]) for name in ("speaker", "stratum"))
        log.info(
            "%s: %s clips of %d speakers in %d strata", self.source_name, counts, speakers, strata
        )


@dataclass(frozen=True)
class _Some:
    """Some rows of clips that are in no files."""

    clips: Clips
    rows: Codes

    def key(self, row: int) -> str:
        return self.clips.key(int(self.rows[row]))

    def seconds(self, row: int) -> float:
        return self.clips.seconds(int(self.rows[row]))

    def wave(self, row: int, rate: int, start: float, stop: float) -> audio.Wave:
        return self.clips.wave(int(self.rows[row]), rate, start, stop)


def _window(checkpoint: str | None, bands: int, rate: int, seconds: float) -> LogMel:
    """The features of the checkpoint, or else those that are set."""
    if checkpoint is None:
        if bands < 1:
            raise UserError(f"data.bands={bands} must be at least 1")
        if rate < 1 or rate % RATE or round(seconds * RATE) % 2 or seconds <= 0:
            raise UserError(
                f"data.rate={rate} must be a multiple of {RATE} and data.seconds={seconds} of "
                "0.02: windows are of pairs of frames of 10 ms"
            )
        return LogMel(bands, rate, round(seconds * RATE))
    with needed():
        from transformers import WhisperFeatureExtractor
    try:
        own = WhisperFeatureExtractor.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.pretrained={checkpoint} has no feature extractor ({line}); give a folder with "
            "the files of a Whisper checkpoint, or its name"
        ) from error
    return LogMel(own.feature_size, own.sampling_rate, own.nb_max_frames)


def _normaliser(kind: Normaliser) -> Any:
    if kind not in ("english", "basic"):
        raise UserError(f"data.normaliser={kind} is english or basic")
    return normaliser(kind)
