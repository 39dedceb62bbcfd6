"""Writes the metrics of a run to TensorBoard, and reads metrics.jsonl. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from time import time
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.event_file_writer import (  # type: ignore[import-untyped]
    EventFileWriter,
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without a half-written last line (of a killed run)."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class TensorBoardWriter:
    """Writes an event file of TensorBoard to a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer = EventFileWriter(str(folder))

    def row(self, row: Mapping[str, Any]) -> None:
        """Write one row as scalars ``<stage>/<name>``, or ``<stage>_step/<name>``."""
        prefix = row["stage"] if row["kind"] == "epoch" else f"{row['stage']}_step"
        values = {
            f"{prefix}/{name}": value
            for name, value in row.items()
            if name not in ("stage", "kind", "epoch", "step") and value is not None
        }
        self.add(scalars(values), row["step"])

    def add(self, values: list[Summary.Value], step: int) -> None:
        """Write many values as one record: one by one they cost more than a training step."""
        event = Event(wall_time=time(), step=step, summary=Summary(value=values))
        self.writer.add_event(event)

    def close(self) -> None:
        """Flush and close the file."""
        self.writer.close()


def scalars(values: Mapping[str, float]) -> list[Summary.Value]:
    """Scalars by tag."""
    return [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
