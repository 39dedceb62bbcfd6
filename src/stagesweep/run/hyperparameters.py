"""TensorBoard's table of hyperparameters: the overrides of a run and its metrics."""

import math
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import (  # type: ignore[import-untyped]
    Summary,
    SummaryMetadata,
)
from tensorboard.plugins.hparams import (  # type: ignore[import-untyped]
    api_pb2,
    metadata,
    plugin_data_pb2,
)

from stagesweep.tracking.tensorboard import TensorBoardWriter, scalars


def write_hyperparameters(
    writer: TensorBoardWriter, overrides: Mapping[str, str], metrics: Mapping[str, float]
) -> None:
    """Write one row of the table: overrides by key, and the metrics they led to."""
    string, number = api_pb2.DataType.DATA_TYPE_STRING, api_pb2.DataType.DATA_TYPE_FLOAT64
    types = {
        name: string if as_number(value) is None else number for name, value in overrides.items()
    }
    experiment = api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=name, type=types[name]) for name in overrides],
        metric_infos=[api_pb2.MetricInfo(name={"tag": name}) for name in metrics],
    )
    start = plugin_data_pb2.SessionStartInfo()
    for name, value in overrides.items():
        if (read := as_number(value)) is None:
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = read
    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.Status.STATUS_SUCCESS)
    values = [
        plugin_data(metadata.EXPERIMENT_TAG, experiment=experiment),
        plugin_data(metadata.SESSION_START_INFO_TAG, session_start_info=start),
        plugin_data(metadata.SESSION_END_INFO_TAG, session_end_info=end),
    ]
    writer.add([*values, *scalars(metrics)], step=0)


def as_number(text: str) -> float | None:
    """The finite number that an override's text is in YAML; None for any other text."""
    try:
        read = float(text)
    except ValueError:
        return None
    return read if math.isfinite(read) and "_" not in text else None


def plugin_data(tag: str, **content: Any) -> Summary.Value:
    """One record for the hyperparameter plugin."""
    data = plugin_data_pb2.HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, **content)
    plugin = SummaryMetadata.PluginData(
        plugin_name=metadata.PLUGIN_NAME, content=data.SerializeToString()
    )
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
