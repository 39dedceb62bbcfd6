"""The spec of a data set: column names, widths and cardinalities, from which models take sizes."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Features:
    """A continuous column of width ``len(names)``.

    ``low`` and ``high`` are the native range a decoder must stay in (None: unbounded). ``ordered``
    features have neighbours (frequencies of an audiogram): attention and smoothness apply to them.
    ``grid`` is (height, width) when the features are the pixels of an image, row by row. ``unit``
    is the axis label of native values. ``isolated`` names of ordered features have
    no neighbours: no line connects them in figures. ``inverted`` features are drawn with low values
    on top.
    """

    names: tuple[str, ...]
    low: float | None = None
    high: float | None = None
    ordered: bool = False
    grid: tuple[int, int] | None = None
    unit: str = ""
    isolated: tuple[str, ...] = ()
    inverted: bool = False


@dataclass(frozen=True)
class Spec:
    """Columns of a data set: continuous features, categories (cardinality), labels (count)."""

    features: dict[str, Features]
    categories: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
