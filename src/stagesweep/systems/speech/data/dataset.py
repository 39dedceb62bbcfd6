"""Recorded speech from a table of clips."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal

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
    AudioFiles,
    CachedFeatures,
    Cepstra,
    ClipSource,
    ClipSubset,
    LogMel,
    cache_folder,
    check_cepstra,
    log_mel,
)
from stagesweep.systems.speech.data.split import SPLITS, Codes
from stagesweep.systems.speech.data.table import read_clips
from stagesweep.systems.speech.data.tokens import (
    Normaliser,
    SpeechSpec,
    Tokenizer,
    Tokens,
    build_normaliser,
    load_tokenizer,
    train_tokenizer,
)
from stagesweep.systems.speech.data.windows import Samples, SpeechView

log = logging.getLogger(__name__)

# Handling of clips longer than the model's window, and of unusable clips.
Long = Literal["refuse", "cut", "split"]
OnError = Literal["refuse", "skip"]


@dataclass(frozen=True)
class Columns:
    """Column map; null columns are ignored.

    `path`: audio file, relative to the table. `row`: number of the clip in a file of features,
    instead of audio. `stratum`: group of speakers (etiology, accent).
    """

    transcript: str
    path: str | None = None
    row: str | None = None
    speaker: str | None = None
    stratum: str | None = None
    split: str | None = None

    def used(self) -> dict[str, str]:
        """Return the name of each column in the table, by its name here."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: column for name, column in named.items() if column}


class Speech:
    """Clips with transcripts, split by speaker.

    A batch has `mel` (B, bands, frames), log-mel features; `frames` (B,), their number without
    padding; `tokens` (B, T), the input of the decoder; `labels` (B, T), its targets, -100 for
    padding; `speaker` and `stratum` (B,), codes; `clip` (B,), the row in `clips`. If a long clip is
    split, each window is a sample without labels.
    """

    spec: SpeechSpec
    # Label -> names of its codes, over all splits.
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
        on_error: OnError = "refuse",
        drop: Sequence[str] = (),
        fraction: float = 1.0,
        fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
        split_by: Literal["speaker", "clip"] = "speaker",
        hold_out: Sequence[str] = (),
        shared_speakers: bool = False,
        split_seed: int = 0,
        source: ClipSource | None = None,
    ) -> None:
        """Prepare a .csv or .jsonl table of clips, or a table in memory.

        `features`: .npz file of features instead of audio, with the arrays `cepstra` or `features`,
        and `offsets`. `pretrained`: Whisper checkpoint whose tokenizer and features are used; None
        trains a tokenizer of `vocabulary` tokens on the training transcripts. `fraction`:
        stratified share of the training clips. The splits of the table, if any, replace
        `fractions`. `hold_out`: all clips of these speakers are test data; other test clips join
        training. `source`: audio of clips without files. Raises UserError for unusable data.
        """
        self.source_name = path if isinstance(path, str) else "the table"
        self._read_table(path, columns, drop)
        self.normalise = build_normaliser(normaliser)
        faults = self._empty_transcripts()
        window = log_mel(pretrained, bands, rate, seconds)
        if features is not None:
            self._read_features(features)
            window = LogMel(self._bands, window.rate, round(seconds * RATE))
        elif source is None:
            faults |= self._inspect_files()
        else:
            self._clips = source
            self.clips["seconds"] = [source.seconds(row) for row in range(len(self.clips))]
        self._handle_faults(faults, on_error)
        self.windows = self._windows(long, window.frames / RATE)
        rows = self._split(fractions, split_by, hold_out, shared_speakers, split_seed)
        kept = split.stratified(self._codes["stratum"][rows["train"]], fraction, split_seed)
        self._rows = rows | {"train": rows["train"][kept]}
        self._check_train(window.frames / RATE)
        self._tokenize(pretrained, language, vocabulary)
        self._describe(window)
        self._features: CachedFeatures | Cepstra
        if features is not None:
            self._features = self._given
        else:
            self._features = CachedFeatures(self._clips, window, cache_folder())

    # ------------------------------------------------------------- interface of stages

    def split(self, name: str) -> SpeechView:
        """Return the windows of a split; raises UserError for an unknown split.

        Training clips longer than one window are excluded.
        """
        if name not in self._rows:
            raise UserError(f"no split {name!r}; there are {', '.join(self._rows)}")
        clips = [self.windows[row] for row in self._rows[name]]
        windows = [each for own in clips if name != "train" or len(own) == 1 for each in own]
        clip = np.array([row for row, _, _ in windows], np.int64)
        tokens = [self._tokens[row] if len(self.windows[row]) == 1 else [] for row in clip]
        columns = {key: torch.from_numpy(code[clip]) for key, code in self._codes.items()}
        samples = Samples(self._features, windows, tokens, self.spec)
        return SpeechView(samples, {**columns, "clip": torch.from_numpy(clip)})

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self._rows)

    def ids(self, split: str) -> NDArray[np.str_]:
        """Return the name of the clip of each window of a split, (n,)."""
        names: NDArray[np.str_] = self.clips["id"].to_numpy(str)[self.split(split)["clip"].numpy()]
        return names

    # ------------------------------------------------------------- preparation

    def _read_table(self, path: str | pd.DataFrame, columns: Columns, drop: Sequence[str]) -> None:
        """Set `clips`: transcript, speaker, stratum, split, id, line, and path or row."""
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
                    f"({len(missing)} in all); fix the table or data.columns.{name}"
                )
        self._folder = Path(path).parent if isinstance(path, str) else Path()
        self._has_split = columns.split is not None
        self._has_speaker = columns.speaker is not None
        self.clips = own[~own["stratum"].isin(list(drop))].reset_index(drop=True)
        if not len(self.clips):
            raise UserError(f"{self.source_name}: data.drop={list(drop)} leaves no clips")

    def _empty_transcripts(self) -> dict[int, str]:
        """Return the fault of each clip whose normalised transcript is empty."""
        reference = self.clips["transcript"].fillna("").map(self.normalise)
        self.clips["reference"] = reference
        return {int(row): "the transcript is empty" for row in np.flatnonzero(reference == "")}

    def _inspect_files(self) -> dict[int, str]:
        """Inspect the audio files and return the fault of each unusable clip."""
        if "path" not in self.clips:
            raise UserError(
                "data.columns.path is not set: name the column of audio files, or give features "
                "instead of audio with data.features and data.columns.row"
            )
        missing = self.clips["path"].isna()
        paths = [self._folder / str(path) for path in self.clips["path"].fillna("")]
        digest = hashlib.sha256(str(self._folder.absolute()).encode()).hexdigest()[:16]
        infos = audio.inspect_all(paths, cache_folder() / f"survey_{digest}.json")
        self._clips = AudioFiles(paths, infos)
        self.clips["seconds"] = [self._clips.seconds(row) for row in range(len(self.clips))]
        faults = {row: f"{paths[row]}: {i.fault}" for row, i in enumerate(infos) if i.fault}
        return faults | {int(r): "the path of its file is empty" for r in np.flatnonzero(missing)}

    def _read_features(self, path: str) -> None:
        """Read a file of features and locate each clip in it."""
        if "row" not in self.clips:
            raise UserError(f"data.features={path} needs data.columns.row, the column of its rows")
        found = read_arrays(Path(path))
        frames = found.get("cepstra", found.get("features"))
        if frames is None or "offsets" not in found:
            raise UserError(
                f"data.features={path} needs the arrays 'cepstra' or 'features', and 'offsets'; "
                f"it has {', '.join(found)}"
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

    def _handle_faults(self, faults: Mapping[int, str], on_error: OnError) -> None:
        """Raise UserError for the first unusable clip, or leave out all of them."""
        lines = [f"line {self.clips['line'][row]}: {faults[row]}" for row in sorted(faults)]
        if lines and on_error == "refuse":
            more = f" (and {len(lines) - 1} more clips)" if len(lines) > 1 else ""
            raise UserError(
                f"{self.source_name}, {lines[0]}{more}; fix it, or leave such clips out with "
                "data.on_error=skip"
            )
        for line in lines[:20]:
            log.warning("left out: %s, %s", self.source_name, line)
        if len(lines) > 20:
            log.warning("left out: %d more clips of %s", len(lines) - 20, self.source_name)
        keep = np.setdiff1d(np.arange(len(self.clips)), sorted(faults))
        if not len(keep):
            raise UserError(f"{self.source_name} has no usable clip: {lines[0]}")
        self._keep(keep)

    def _keep(self, rows: Codes) -> None:
        self.clips = self.clips.iloc[rows].reset_index(drop=True)
        clips = getattr(self, "_clips", None)
        if isinstance(clips, AudioFiles):
            paths, infos = [clips.paths[r] for r in rows], [clips.infos[r] for r in rows]
            self._clips = AudioFiles(paths, infos)
        elif clips is not None:
            self._clips = ClipSubset(clips, rows)
        if hasattr(self, "_given"):
            own = self._given
            self._given = Cepstra(own.frames, own.offsets, own.rows[rows])

    def _windows(self, long: Long, window: float) -> list[list[tuple[int, float, float]]]:
        """Return the windows (clip, start, stop) of each clip; raises UserError for a long clip if
        `long` is refuse.
        """
        seconds = self.clips["seconds"].to_numpy(float)
        over = np.flatnonzero(seconds > window + 0.5 / RATE)
        if len(over) and long == "refuse":
            row = over[0]
            raise UserError(
                f"{self.source_name}, line {self.clips['line'][row]}: a clip of {seconds[row]:.2f} "
                f"s is longer than the window of {window:g} s ({len(over)} in all); "
                "set data.long=cut to cut off its end, data.long=split to decode it in several "
                "windows, or a larger data.seconds"
            )
        if len(over):
            done = "cut" if long == "cut" else "split into windows and excluded from training"
            log.warning("%d clips longer than %g s are %s", len(over), window, done)
        windows: list[list[tuple[int, float, float]]] = []
        for row, length in enumerate(seconds):
            if long == "split" and row in set(over):
                count = int(np.ceil(length / window))
                edges = np.linspace(0, length, count + 1)
                windows.append([(row, a, b) for a, b in pairwise(edges)])
            else:
                windows.append([(row, 0.0, min(length, window))])
        return windows

    def _split(
        self,
        fractions: tuple[float, float, float],
        split_by: str,
        hold_out: Sequence[str],
        shared: bool,
        seed: int,
    ) -> dict[str, Codes]:
        """Return the clips of each split."""
        if min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise UserError(f"data.fractions={list(fractions)} must be positive and add up to 1")
        self._encode_labels()
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
            rows = self._hold_out(rows, hold_out)
        names = self.label_names["speaker"]
        if self._has_split and not shared and not hold_out:
            split.check_disjoint(rows, speaker, names, self.source_name)
        return rows

    def _hold_out(self, rows: Mapping[str, Codes], names: Sequence[str]) -> dict[str, Codes]:
        """All clips of these speakers are test data; other test clips join training."""
        known = self.label_names["speaker"]
        for name in names:
            if name not in known:
                raise UserError(
                    f"data.hold_out: no speaker {name!r} in {self.source_name}; there are "
                    f"{', '.join(known[:10])}"
                )
        held = np.isin(self._codes["speaker"], [known.index(name) for name in names])
        if held.all():
            raise UserError("data.hold_out names every speaker; leave some for training")
        train = np.sort(np.concatenate([rows["train"], rows["test"]]))
        return {
            "train": train[~held[train]],
            "val": rows["val"][~held[rows["val"]]],
            "test": np.flatnonzero(held),
        }

    def _check_train(self, window: float) -> None:
        """Raise UserError if all training clips are longer than one window."""
        if all(len(self.windows[row]) > 1 for row in self._rows["train"]):
            raise UserError(
                f"{self.source_name}: every training clip is longer than the window of {window:g} "
                "s, and such clips are excluded from training; raise data.seconds, or set "
                "data.long=cut"
            )

    def _encode_labels(self) -> None:
        """Set `label_names` and the codes of speakers and strata."""
        self.label_names, self._codes = {}, {}
        for name in ("speaker", "stratum"):
            found = self.clips[name].astype("category").cat
            self.label_names[name] = [str(each) for each in found.categories]
            self._codes[name] = found.codes.to_numpy(np.int64, copy=True)

    def _tokenize(self, checkpoint: str | None, language: str, size: int) -> None:
        """Encode all transcripts with the tokenizer of the checkpoint, or one trained on train."""
        texts = self.clips["transcript"].fillna("").astype(str).tolist()
        if checkpoint is None:
            own = [self.clips["reference"][row] for row in self._rows["train"]]
            self.tokenizer: Tokenizer = train_tokenizer(own, size)
            texts = self.clips["reference"].tolist()
        else:
            self.tokenizer = load_tokenizer(checkpoint, language)
        self._tokens = [self.tokenizer.encode(text) for text in texts]

    def _describe(self, window: LogMel) -> None:
        """Set the spec: bands, frames, tokens, numbers of speakers and strata."""
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
