"""What a fit says while it runs: metrics.jsonl, TensorBoard, a progress bar."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from stagesweep.files import atomic_text


class MetricLog:
    """Rows of numbers, to ``metrics.jsonl`` of a stage and to the run's TensorBoard.

    A row has ``kind`` (``step`` or ``epoch``), ``epoch``, ``step`` and values. The file is the
    record that a reused stage brings along, from which TensorBoard is written again.
    """

    def __init__(self, path: Path, board: SummaryWriter, stage: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.board, self.stage = path, board, stage
        self.stream = path.open("a")

    def row(self, kind: str, epoch: int, step: int, values: Mapping[str, float]) -> None:
        """Write one row; its values become TensorBoard scalars ``<stage>/<name>``."""
        row = {"stage": self.stage, "kind": kind, "epoch": epoch, "step": step, **values}
        self.stream.write(json.dumps(row) + "\n")
        to_board(self.board, row)

    def histograms(self, model: nn.Module, step: int) -> None:
        """Distributions of every parameter and of its gradient."""
        for name, parameter in model.named_parameters():
            if parameter.numel() and parameter.requires_grad:
                self.board.add_histogram(f"{self.stage}/{name}", parameter.detach(), step)
                if parameter.grad is not None:
                    self.board.add_histogram(f"{self.stage}/{name}.grad", parameter.grad, step)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: an interrupted fit writes them again."""
        self.stream.close()
        rows = [row for row in read_rows(self.path) if row["step"] <= step]
        atomic_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.stream = self.path.open("a")
        for row in rows:
            to_board(self.board, row)

    def flush(self) -> None:
        """Let readers see all rows written so far."""
        self.stream.flush()

    def close(self) -> None:
        """Close the file."""
        self.stream.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a half-written last line (a killed run) is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def to_board(board: SummaryWriter, row: Mapping[str, Any]) -> None:
    """One row of numbers as TensorBoard scalars."""
    for name, value in row.items():
        if name not in ("stage", "kind", "epoch", "step"):
            tag = (
                f"{row['stage']}/{name}"
                if row["kind"] == "epoch"
                else f"{row['stage']}_step/{name}"
            )
            board.add_scalar(tag, value, row["step"])


def progress_bar(stage: str, total: int, done: int) -> "tqdm[Any]":
    """A bar over the optimizer steps of a fit; silent when stderr is not a terminal."""
    return tqdm(total=total, initial=done, desc=stage, unit="step", disable=None, leave=False)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak GPU memory of this process in MiB; empty on CPU."""
    if device.type != "cuda":
        return {}
    return {"gpu_mib": torch.cuda.max_memory_allocated(device) / 2**20}
