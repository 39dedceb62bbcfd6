"""The header of every YAML is short: what it is, the command, the time, the result."""

from pathlib import Path

import pytest

from stagesweep.config import register

CONF = register.folder()
MAX_LINES, MAX_WIDTH = 6, 100


def header(path: Path) -> list[str]:
    """The comment lines at the top of a file, without Hydra's package directive."""
    found = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            found.append(line)
    return found


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF))
)
def test_a_header_has_at_most_six_lines(path: Path) -> None:
    """Longer explanations belong on the docs page of the system."""
    lines = header(path)
    assert lines, "no header"
    assert len(lines) <= MAX_LINES
    assert [line for line in lines if len(line) > MAX_WIDTH] == []
