"""Reading CSV files, and the errors for invalid ones."""

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


@pytest.mark.parametrize("separator", [";", "\t", ","])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_the_separator_is_recognised(table, tmp_path, separator, bom):
    path = tmp_path / "european.csv"
    path.write_text(bom + TEXT.replace(",", separator))
    assert read_table(path).equals(table)
    path.write_text(bom + TEXT.replace(",", separator).replace("animal", '"animal"'))
    assert read_table(path).equals(table)


def test_separators_in_quotes_or_in_text_are_ignored(tmp_path):
    path = tmp_path / "mice.csv"
    path.write_text('animal,"a;b;c;d",litter\nx;y;z,1,2\nu;v,3,4\n')
    assert list(read_table(path)) == ["animal", "a;b;c;d", "litter"]
    path.write_text("animal;6,5 kHz;12,5 kHz;25,5 kHz\na;1,5;2;3\nb;1;2,5;3\n")
    assert list(read_table(path)) == ["animal", "6,5 kHz", "12,5 kHz", "25,5 kHz"]


def test_a_given_separator_is_used(tmp_path):
    path = tmp_path / "mice.csv"
    path.write_text("a,b;c\n1,2;3\n")
    assert list(read_table(path, "semicolon")) == ["a,b", "c"]
    with pytest.raises(UserError, match=r"data.separator=';' must be auto, comma, semicolon or"):
        read_table(path, ";")


def test_a_line_that_does_not_fit_names_the_key(tmp_path):
    path = tmp_path / "mice.csv"
    path.write_text("a;b\n1;2\n1;2;3\n")
    with pytest.raises(UserError, match=r"line 3, saw 3, read with .* semicolon; .*separator") as e:
        read_table(path)
    assert "C error" not in str(e.value)
    assert "\n" not in str(e.value)
    path.write_text("a,b\n1,2,3\n4,5,6\n")
    with pytest.raises(UserError, match=r"more values in a line than names.*data\.separator"):
        read_table(path)


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("decimal", ["auto", "comma"])
def test_decimal_commas_are_numbers(tmp_path, separator, decimal):
    path = tmp_path / "mice.csv"
    path.write_text("a;b\n1,5;7\n;-0,25\n".replace(";", separator))
    found = numeric_columns(read_table(path), ["a", "b"], "x", decimal)
    np.testing.assert_array_equal(found, [[1.5, 7], [np.nan, -0.25]])


@pytest.mark.parametrize(
    ("text", "decimal", "message"),
    [
        ("a;b\n1,5;7.5\n", "auto", r"'1,5' is not a number: .*line 2 of x; set data.decimal=comma"),
        ("a;b\n1,500;7\n", "auto", r"'1,500' in x can .*; set data.decimal=comma"),
        ("a;b\n1.5;7\n", "comma", r"'1.5' is not a number: .*; set data.decimal=point"),
        ("a;b\n1.234,5;7,5\n", "auto", r"'1.234,5' is not a number"),
        ('a,b\n"1,5",7\n', "auto", r"'1,5' is not a number: .*; set data.decimal=comma"),
        ("a;b\n1;7\n", ",", r"data.decimal=',' must be auto, point or comma"),
    ],
)
def test_an_ambiguous_decimal_mark_names_the_key(tmp_path, text, decimal, message):
    path = tmp_path / "mice.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        numeric_columns(read_table(path), ["a", "b"], "x", decimal)


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
