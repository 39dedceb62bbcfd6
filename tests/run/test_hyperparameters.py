"""The table of hyperparameters."""

from typing import Any

from tensorboard.plugins.hparams import plugin_data_pb2  # type: ignore[import-untyped]

from stagesweep.run.hyperparameters import write_hyperparameters


class Writer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def add(self, values: list[Any], step: int) -> None:
        self.values += values


def test_numeric_overrides_are_numbers() -> None:
    writer: Any = Writer()
    write_hyperparameters(writer, {"lr": "1e-3", "k": "4", "model": "vae", "x": "nan"}, {})
    records = [
        plugin_data_pb2.HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for value in writer.values
    ]
    given = next(r.session_start_info for r in records if r.HasField("session_start_info")).hparams
    assert given["lr"].number_value == 1e-3
    assert given["k"].number_value == 4
    assert given["model"].string_value == "vae"
    assert given["x"].string_value == "nan"
