from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from stagesweep.tracking.tensorboard import TensorBoardWriter, read_rows


def test_a_half_written_last_row_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "trai')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_the_values_of_a_row_are_scalars(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.row({"stage": "a", "kind": "epoch", "epoch": 1, "step": 3, "loss": 1.5, "b": None})
    writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["a/loss"]
    assert [(event.step, event.value) for event in events.Scalars("a/loss")] == [(3, 1.5)]
