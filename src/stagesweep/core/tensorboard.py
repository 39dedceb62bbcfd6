"""The numbers of a run as they are kept: rows in metrics.jsonl, and TensorBoard. Needs no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from time import time
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]
    Summary,
    SummaryMetadata,
)
from tensorboard.plugins.hparams import (  # type: ignore[import-untyped]
    api_pb2,
    metadata,
    plugin_data_pb2,
)
from tensorboard.summary.writer.event_file_writer import (  # type: ignore[import-untyped]
    EventFileWriter,
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a half-written last line (a killed run) is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Board:
    """TensorBoard's file of events in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer = EventFileWriter(str(folder))

    def row(self, row: Mapping[str, Any]) -> None:
        """One row of numbers as scalars ``<stage>/<name>``, or ``<stage>_step/<name>``."""
        prefix = row["stage"] if row["kind"] == "epoch" else f"{row['stage']}_step"
        values = {
            f"{prefix}/{name}": value
            for name, value in row.items()
            if name not in ("stage", "kind", "epoch", "step") and value is not None
        }
        self.add(scalars(values), row["step"])

    def hyperparameters(self, chosen: Mapping[str, str], metrics: Mapping[str, float]) -> None:
        """What was set and what came of it, for the table of hyperparameters."""
        text = api_pb2.DataType.DATA_TYPE_STRING
        experiment = api_pb2.Experiment(
            hparam_infos=[api_pb2.HParamInfo(name=name, type=text) for name in chosen],
            metric_infos=[api_pb2.MetricInfo(name={"tag": name}) for name in metrics],
        )
        start = plugin_data_pb2.SessionStartInfo()
        for name, value in chosen.items():
            start.hparams[name].string_value = value
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.STATUS_SUCCESS)
        values = [
            about(metadata.EXPERIMENT_TAG, experiment=experiment),
            about(metadata.SESSION_START_INFO_TAG, session_start_info=start),
            about(metadata.SESSION_END_INFO_TAG, session_end_info=end),
        ]
        self.add([*values, *scalars(metrics)], step=0)

    def add(self, values: list[Summary.Value], step: int) -> None:
        """Many values in one record: one by one they cost more than a training step."""
        event = Event(wall_time=time(), step=step, summary=Summary(value=values))
        self.writer.add_event(event)

    def close(self) -> None:
        """Write what is waiting and close the file."""
        self.writer.close()


def scalars(values: Mapping[str, float]) -> list[Summary.Value]:
    """Numbers by their tag."""
    return [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]


def about(tag: str, **content: Any) -> Summary.Value:
    """One piece of what the plugin for hyperparameters reads."""
    data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(
        plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString()
    )
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
