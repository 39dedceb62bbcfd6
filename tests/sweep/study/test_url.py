"""URLs of databases are shown without their password."""

from stagesweep.sweep.study.url import password, without_password


def test_a_password_is_not_written() -> None:
    shown = "postgresql://me@host:5432/studies"
    assert without_password("postgresql://me:secret@host:5432/studies") == shown
    assert without_password(f"{shown}?password=secret") == shown
    assert without_password("sqlite:///study.db") == "sqlite:///study.db"
    assert without_password("no url") == "no url"


def test_the_password_is_found() -> None:
    assert password("postgresql://me:secret@host:5432/studies") == "secret"
    assert password("postgresql://me@host/studies?password=secret") == "secret"
    assert password("sqlite:///study.db") == ""
    assert password("no url") == ""
