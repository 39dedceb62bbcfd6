"""A .npz file is read whole, or its fault is said in a line that names it."""

import io
from pathlib import Path

import numpy as np
import pytest

from stagesweep.base.errors import UserError
from stagesweep.data.arrays import read_arrays


def packed() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.arange(300))
    return stream.getvalue()


def pickled() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.array([{}], dtype=object))
    return stream.getvalue()


def test_every_array_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(packed())
    assert read_arrays(tmp_path / "a.npz")["a"].tolist() == list(range(300))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (packed()[:-30], "File is not a zip file"),
        (packed()[:500] + b"xyz" + packed()[503:], "Bad CRC-32 for file 'a.npy'"),
        (packed().replace(b"NUMPY", b"NUMPI"), "Bad CRC-32"),
        (b"", "No data left in file"),
        (b"PK\x03\x04", "File is not a zip file"),
        (pickled(), "Object arrays cannot be loaded when allow_pickle=False"),
    ],
    ids=["truncated", "changed", "header", "empty", "zip", "pickle"],
)
def test_a_damaged_or_foreign_file_is_named(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=f"a.npz is not a readable .npz file: .*{text}") as error:
        read_arrays(tmp_path / "a.npz")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a.npz is not a readable .npz file: .*No such file"):
        read_arrays(tmp_path / "a.npz")
