"""The logs of a fit: metrics.jsonl, TensorBoard and a progress bar."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]
    HistogramProto,
    Summary,
)
from torch import Tensor
from tqdm import tqdm

from stagesweep.base.files import atomic_text, explained
from stagesweep.tracking.tensorboard import TensorBoardWriter, read_rows


class MetricLog:
    """Logs rows of metrics to ``metrics.jsonl`` of a stage and to the run's TensorBoard.

    A row has ``kind`` (``step`` or ``epoch``), ``epoch``, ``step`` and values. When a stage is
    reused, its file fills the TensorBoard of the new run.
    """

    def __init__(self, path: Path, writer: TensorBoardWriter, stage: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.writer, self.stage = path, writer, stage
        self.stream = path.open("a")

    def row(self, kind: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write one row; its values become TensorBoard scalars ``<stage>/<name>``."""
        # JSON has no NaN and no infinity.
        known = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"stage": self.stage, "kind": kind, "epoch": epoch, "step": step, **known}
        with explained(self.path):
            self.stream.write(json.dumps(row) + "\n")
            self.stream.flush()
            self.writer.row(row)

    def histograms(self, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Write histograms of tensors by name."""
        values = [histogram(f"{self.stage}/{name}", tensor) for name, tensor in tensors]
        with explained(self.path):
            self.writer.add(values, step)

    def rewind(self, epoch: int, step: int) -> None:
        """Drop the rows after `step` and `epoch`, which the resumed fit writes again.

        Rows of other fits in the same file stay.
        """
        self.stream.close()
        last = {"step": step, "epoch": epoch}

        def stays(row: Mapping[str, Any]) -> bool:
            return bool(row["stage"] != self.stage or row[row["kind"]] <= last[row["kind"]])

        rows = [row for row in read_rows(self.path) if stays(row)]
        atomic_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.stream = self.path.open("a")
        for row in rows:
            if row["stage"] == self.stage:
                self.writer.row(row)

    def close(self) -> None:
        """Close the file."""
        with explained(self.path):
            self.stream.close()


def histogram(tag: str, values: Tensor, bins: int = 30) -> Summary.Value:
    """A histogram of the finite `values` in equal bins, as many as TensorBoard draws."""
    values = values[values.isfinite()].float()
    low, high = (value.item() for value in values.aminmax()) if len(values) else (0.0, 0.0)
    left, right = (low, high) if low < high else (low - 1, high + 1)
    counted = HistogramProto(
        min=low,
        max=high,
        num=len(values),
        sum=values.sum().item(),
        sum_squares=values.square().sum().item(),
        bucket_limit=torch.linspace(left, right, bins + 1)[1:].tolist(),
        bucket=values.histc(bins, left, right).tolist(),
    )
    return Summary.Value(tag=tag, histo=counted)


class NullMetricLog(MetricLog):
    """The log of a process that does not write."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def row(self, kind: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def histograms(self, tensors: Iterable[tuple[str, Tensor]], step: int) -> None:
        """Write nothing, but gather sharded tensors, which all processes must do."""
        for _ in tensors:
            pass

    def rewind(self, epoch: int, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def progress_bar(stage: str, done: int, visible: bool = True) -> "tqdm[Any]":
    """A progress bar over the steps of a fit; hidden when stderr is not a terminal."""
    return tqdm(
        initial=done, desc=stage, unit="step", disable=None if visible else True, leave=False
    )
