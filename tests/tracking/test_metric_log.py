import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import nn

from stagesweep.base.errors import UserError
from stagesweep.core.optim import parameters_and_gradients
from stagesweep.tracking.metric_log import MetricLog, histogram, progress_bar
from stagesweep.tracking.tensorboard import TensorBoardWriter, read_rows


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[TensorBoardWriter]:
    writer = TensorBoardWriter(tmp_path / "tensorboard")
    yield writer
    writer.close()


def read_back(writer: TensorBoardWriter) -> EventAccumulator:
    writer.writer.flush()
    events = EventAccumulator(str(writer.folder), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    return events


def scalars(writer: TensorBoardWriter) -> dict[str, list[tuple[int, Any]]]:
    events = read_back(writer)
    return {
        tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


class TestRows:
    def test_rows_are_in_the_file_and_in_tensorboard(
        self, tmp_path: Path, writer: TensorBoardWriter
    ) -> None:
        log = MetricLog(tmp_path / "deep" / "metrics.jsonl", writer, "joint")
        log.row("step", 1, 50, {"train_loss": 0.5, "lr_default": 1e-3})
        log.row("epoch", 1, 60, {"train_loss": 0.25, "val_loss": 0.75})
        rows = read_rows(log.path)  # readable before it is closed
        assert rows == [
            {
                "stage": "joint",
                "kind": "step",
                "epoch": 1,
                "step": 50,
                "train_loss": 0.5,
                "lr_default": 1e-3,
            },
            {
                "stage": "joint",
                "kind": "epoch",
                "epoch": 1,
                "step": 60,
                "train_loss": 0.25,
                "val_loss": 0.75,
            },
        ]
        assert scalars(writer) == {
            "joint_step/train_loss": [(50, 0.5)],
            "joint_step/lr_default": [(50, 1e-3)],
            "joint/train_loss": [(60, 0.25)],
            "joint/val_loss": [(60, 0.75)],
        }
        log.close()

    def test_nan_and_infinities_are_null(self, tmp_path: Path, writer: TensorBoardWriter) -> None:
        log = MetricLog(tmp_path / "metrics.jsonl", writer, "fit")
        log.row("epoch", 1, 2, {"a": math.nan, "b": math.inf, "c": 1.0})
        log.close()

        def refuse(name: str) -> None:
            raise AssertionError(name)

        (row,) = (json.loads(x, parse_constant=refuse) for x in log.path.read_text().splitlines())
        assert [row[name] for name in "abc"] == [None, None, 1.0]
        assert scalars(writer) == {"fit/c": [(2, 1.0)]}

    def test_rewinding_keeps_rows_that_are_not_written_again(
        self, tmp_path: Path, writer: TensorBoardWriter
    ) -> None:
        log = MetricLog(tmp_path / "metrics.jsonl", writer, "fit")
        for step in range(1, 9):
            log.row("step", (step + 3) // 4, step, {"loss": float(step)})
            if step % 4 == 0:
                log.row("epoch", step // 4, step, {"loss": 0.0})
        log.stream.write('{"stage": "fi')
        # Stopped after the last step of epoch 2, before its end.
        log.rewind(epoch=1, step=8)
        log.row("epoch", 2, 8, {"loss": 0.5})
        log.close()
        rows = [(row["kind"], row["step"], row["loss"]) for row in read_rows(log.path)]
        steps = [("step", n, float(n)) for n in range(1, 9)]
        assert rows == [*steps[:4], ("epoch", 4, 0.0), *steps[4:], ("epoch", 8, 0.5)]

    def test_rewinding_fills_a_new_tensorboard(
        self, tmp_path: Path, writer: TensorBoardWriter
    ) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text(
            '{"stage": "fit", "kind": "epoch", "epoch": 1, "step": 5, "loss": 2.0}\n'
            '{"stage": "fit", "kind": "epoch", "epoch": 2, "step": 10, "loss": 1.0}\n'
        )
        log = MetricLog(path, writer, "fit")
        log.rewind(epoch=1, step=5)
        log.close()
        assert scalars(writer) == {"fit/loss": [(5, 2.0)]}

    def test_a_full_disk_is_one_line(self, writer: TensorBoardWriter) -> None:
        log = MetricLog(Path("/dev/full"), writer, "fit")
        with pytest.raises(UserError, match=r"^disk full: cannot write /dev/full"):
            log.row("epoch", 1, 1, {"loss": 1.0})
        with pytest.raises(UserError, match=r"^disk full: cannot write /dev/full"):
            log.close()


class TestHistogram:
    @given(
        hnp.arrays(
            np.float32,
            st.integers(2, 60),
            # Between numbers that fp32 holds with a few digits only there are no thirty edges.
            elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
        )
    )
    def test_counts_are_those_of_numpy(self, values: np.ndarray) -> None:
        found = histogram("a", torch.from_numpy(values)).histo
        assert found.min == values.min()
        assert found.max == values.max()
        assert found.num == len(values)
        assert found.sum == pytest.approx(values.sum(), rel=1e-4, abs=1e-2)
        assert found.sum_squares == pytest.approx(np.square(values).sum(), rel=1e-4)
        assert sum(found.bucket) == len(values)
        assert list(found.bucket_limit) == sorted(found.bucket_limit)
        # At an edge fp32 may fall either way.
        edges = np.concatenate([[-np.inf], list(found.bucket_limit)])
        slack = 1e-4 * (1 + np.abs(values).max())
        for number, count in enumerate(np.cumsum(found.bucket)):
            below = (values <= edges[number + 1] - slack).sum()
            assert below <= count <= (values <= edges[number + 1] + slack).sum()

    @pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0], []])
    def test_equal_values_and_no_values(self, values: list[float]) -> None:
        found = histogram("a", torch.tensor(values)).histo
        assert found.num == sum(found.bucket) == len(values)

    def test_values_that_are_not_finite_are_left_out(self) -> None:
        found = histogram("a", torch.tensor([1.0, math.nan, math.inf, -math.inf, 2.0])).histo
        assert (found.num, found.min, found.max) == (2, 1.0, 2.0)

    def test_values_in_half_precision(self) -> None:
        found = histogram("a", torch.tensor([1.0, 2.0], dtype=torch.bfloat16)).histo
        assert (found.num, found.min, found.max) == (2, 1.0, 2.0)

    def test_parameters_and_gradients_in_tensorboard(
        self, tmp_path: Path, writer: TensorBoardWriter
    ) -> None:
        inner = nn.Linear(3, 2)
        model = nn.Sequential(inner, nn.Linear(2, 1).requires_grad_(False))
        model(torch.ones(4, 3)).sum().backward()
        log = MetricLog(tmp_path / "metrics.jsonl", writer, "fit")
        log.histograms(parameters_and_gradients(model), 7)
        log.close()
        events = read_back(writer)
        names = {"fit/0.weight", "fit/0.bias", "fit/0.weight.grad", "fit/0.bias.grad"}
        assert set(events.Tags()["histograms"]) == names
        (event,) = events.Histograms("fit/0.weight")
        assert event.step == 7
        assert event.histogram_value.num == 6
        assert event.histogram_value.max == pytest.approx(inner.weight.max().item())


def test_the_progress_bar_is_hidden_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("fit", 0) as bar:
        bar.total = 3
        bar.update()
    assert capsys.readouterr() == ("", "")
