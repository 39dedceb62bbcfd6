"""Reading CSV files, and the errors that say what is wrong with one."""

import gzip

import numpy as np
import pytest

from stagesweep.base.errors import UserError
from stagesweep.data.table import numeric_columns, read_table, require_columns

TEXT = "animal,abr_6khz,litter\na,35.0,001\nb,,002\nc,4e1,\n"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "mice.csv"
    path.write_text(TEXT)
    return read_table(path)


def test_plain_and_compressed_files_are_the_same(table, tmp_path):
    path = tmp_path / "mice.csv.gz"
    path.write_bytes(gzip.compress(TEXT.encode()))
    assert read_table(str(path)).equals(table)
    assert table["litter"].tolist()[:2] == ["001", "002"]


def test_numbers_are_parsed_and_gaps_are_nan(table):
    np.testing.assert_array_equal(numeric_columns(table, ["abr_6khz"], "x")[:, 0], [35, np.nan, 40])
    assert numeric_columns(table, [], "x").shape == (3, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no file .*mice.csv; give the CSV file to read with data\.path=\.\.\."),
        (b"", r"mice.csv holds no rows"),
        (b"a,b\n", r"mice.csv holds no rows"),
        (b"a,b\n1,2\n1,2,3\n", r"mice.csv is not a readable CSV file: .*line 3"),
        (b"a,b\n\xff\xfe\x00,1\n", r"mice.csv is not a readable CSV file: .*utf-8"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "mice.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_a_truncated_archive_is_named(tmp_path):
    path = tmp_path / "mice.csv.gz"
    path.write_bytes(gzip.compress(TEXT.encode() * 500)[:-40])
    with pytest.raises(UserError, match=r"mice.csv.gz is not a readable CSV file"):
        read_table(path)
    path.write_bytes(TEXT.encode())
    with pytest.raises(UserError, match=r"mice.csv.gz is not a readable CSV file"):
        read_table(path)


def test_a_missing_column_is_named_with_the_nearest(table):
    require_columns(table, ["animal", "litter"], "mice.csv")
    with pytest.raises(
        UserError, match=r"no column 'abr_6hz' in mice.csv; the nearest is 'abr_6khz'"
    ):
        require_columns(table, ["animal", "abr_6hz"], "mice.csv")


@pytest.mark.parametrize("value", ["high", "1,5", "inf"])
def test_text_among_numbers_is_named_with_its_line(table, value):
    table.loc[1, "abr_6khz"] = value
    with pytest.raises(
        UserError, match=rf"'{value}' is not a number: column 'abr_6khz', line 3 of mice.csv"
    ):
        numeric_columns(table, ["abr_6khz"], "mice.csv")
