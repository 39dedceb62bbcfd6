"""Stage that saves the encoder states of clips."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from stagesweep.base import signals
from stagesweep.base.files import atomic_text, explained
from stagesweep.base.view import Batch
from stagesweep.config.schema import bounded
from stagesweep.core.predict import to_device
from stagesweep.hardware.out_of_memory import OutOfMemoryRetry
from stagesweep.parallel.micro_batches import split as split_batch
from stagesweep.systems.speech.data.sampler import Subset

if TYPE_CHECKING:
    from stagesweep.run.context import Context

SPLITS = ("train", "val")


@dataclass
class Extract:
    """Save the mean encoder state of `samples` training clips (see `Subset`) and all of val.

    Saves ``pooled.npy`` (n, width), fp32, and ``extracted.csv``, which describes each row. `states`
    also saves the encoder states: ``states.npy`` (n, positions, width), fp16, and ``frames.npy``
    (n,). Later fits then read these and skip the encoder.

    Results are written every `every` clips; a killed run resumes there, with equal results. Memory
    is independent of the number of clips.

    `model_unused`: keys of the model that do not affect this stage, because encoder states do not
    depend on experts. The extraction is reused if they change.
    """

    samples: float | int | None = bounded(None, gt=0)
    states: bool = False
    batch_size: int = bounded(64, ge=1)
    every: int = bounded(100, ge=1)
    model_unused: Sequence[str] = (
        "experts", "k", "rank", "alpha", "dropout", "hidden", "curriculum", "temperature", "noise",
    )  # fmt: skip

    def __call__(self, run: "Context") -> dict[str, float]:
        """Return the number of clips and the width of their vectors."""
        model: Any = run.model
        model.eval()
        table = self.table(run)
        width, n = model.whisper.config.d_model, len(table)
        files = {"pooled.npy": RowFile(run.file("pooled.npy"), (n, width), np.dtype(np.float32))}
        if self.states:
            shape = (n, model.whisper.config.max_source_positions, width)
            files["states.npy"] = RowFile(run.file("states.npy"), shape, np.dtype(np.float16))
            files["frames.npy"] = RowFile(run.file("frames.npy"), (n,), np.dtype(np.int64))
        progress = ExtractionProgress(run.file("progress.json", "checkpoints"))
        if progress.done == 0:
            for rows in files.values():
                rows.create()
        elif progress.done < len(table):
            run.log.info("%s: resuming at clip %d of %d", run.stage, progress.done, len(table))
        with signals.deferred():
            for number, found in self.chunks(run, table, progress.done):
                for name, rows in files.items():
                    rows.write(number, found[name])
                progress.save(number + len(found["pooled.npy"]))
                if signum := signals.pending():
                    raise signals.stop(signum)
        run.save("extracted.csv", table)
        run.forget_checkpoints()
        return {"clips": float(n), "width": float(width)}

    def table(self, run: "Context") -> pd.DataFrame:
        """Return the clips to extract: split, row in the split, id, speaker and stratum."""
        parts = []
        for split in SPLITS:
            view = run.data.split(split)
            samples = self.samples if split == "train" else None
            rows = Subset(samples, run.cfg.seed).rows(view).numpy()
            names = {
                name: np.array(run.data.label_names[name])[view[name].numpy()[rows]]
                for name in ("speaker", "stratum")
            }
            ids = run.data.ids(split)[rows]
            parts.append(pd.DataFrame({"split": split, "row": rows, "id": ids, **names}))
        return pd.concat(parts, ignore_index=True)

    def chunks(
        self, run: "Context", table: pd.DataFrame, done: int
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Iterate over chunks of `every` clips after clip `done`: first clip, and its arrays.

        Batches do not depend on interruptions of the run.
        """
        retry = OutOfMemoryRetry(run.profile.micro_batch, "extraction", run.profile)
        first = 0
        for split in SPLITS:
            rows = torch.from_numpy(table.loc[table["split"] == split, "row"].to_numpy(copy=True))
            order = list(torch.arange(len(rows)).split(self.every)) if len(rows) else []
            skipped = sum(first + int(each[-1]) < done for each in order)
            view = run.prepared(run.data.split(split).take(rows))
            batches = view.gather(order, skipped)
            for chunk, batch in zip(order[skipped:], run.progress(batches, split), strict=True):
                attempt = partial(self.encode, run, batch)
                yield first + int(chunk[0]), retry.run(attempt, self.batch_size)
            first += len(rows)
        run.measured["oom"] += retry.events

    def encode(self, run: "Context", batch: Batch, size: int) -> dict[str, NDArray[Any]]:
        """Return the arrays of a chunk by file name, computed in batches of `size`."""
        model: Any = run.model
        profile, pooled, states = run.profile, list[Tensor](), list[Tensor]()
        frames = batch["frames"].numpy()
        with torch.inference_mode():
            for part in split_batch(batch, size):
                part = to_device(part, profile.device)
                with torch.autocast(
                    profile.device.type, profile.autocast, enabled=profile.autocast is not None
                ):
                    found = model.encode(part)
                pooled.append(model.pool(found, part["frames"]).float().cpu())
                if self.states:
                    states.append(found.half().cpu())
        vectors = {"pooled.npy": torch.cat(pooled).numpy()}
        if self.states:
            vectors |= {"states.npy": torch.cat(states).numpy(), "frames.npy": frames}
        return vectors

    def metric_names(self) -> set[str] | None:
        """Names of the metrics of this stage."""
        return {"clips", "width"}


class RowFile:
    """A .npy file that is written in chunks of rows, without an array in memory."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype

    def create(self) -> None:
        """Create the file in full length."""
        with explained(self.path):
            array = np.lib.format.open_memmap(self.path, "w+", self.dtype, self.shape)
            del array

    def write(self, row: int, values: NDArray[Any]) -> None:
        """Write rows at their position, and sync."""
        width = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        length = self.dtype.itemsize * int(np.prod(self.shape))
        with explained(self.path), self.path.open("r+b") as stream:
            stream.seek(self.path.stat().st_size - length + row * width)
            stream.write(np.ascontiguousarray(values, self.dtype).tobytes())
            stream.flush()
            os.fsync(stream.fileno())


class ExtractionProgress:
    """Number of clips that are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.done = int(json.loads(path.read_text())["done"])
        except (OSError, ValueError, KeyError, TypeError):
            self.done = 0

    def save(self, done: int) -> None:
        """Save the number of written clips."""
        atomic_text(self.path, json.dumps({"done": done}))
        self.done = done
