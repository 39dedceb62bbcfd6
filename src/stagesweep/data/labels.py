"""Names of label values."""

from typing import Any


def label_names(data: Any, label: str) -> list[str]:
    """Names of the codes of a label; the codes themselves when the data has no names for them."""
    names: dict[str, list[str]] = getattr(data, "label_names", {})
    return names.get(label) or [str(code) for code in range(data.spec.labels[label])]
