"""Names of label values."""

from typing import Any


def label_names(data: Any, label: str) -> list[str]:
    """What the codes of a label stand for; the codes themselves when the data does not say."""
    names: dict[str, list[str]] = getattr(data, "label_names", {})
    return names.get(label) or [str(code) for code in range(data.spec.labels[label])]
