"""The URL of a study's database, with and without its password."""

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError


def password(storage: str) -> str:
    """The password in the URL of a storage, or an empty string."""
    try:
        url = make_url(storage)
    except ArgumentError:
        return ""
    return str(url.password or url.query.get("password") or "")


def without_password(storage: str) -> str:
    """The URL of a storage without its password, to be shown and recorded.

    The driver finds the password elsewhere (PGPASSWORD, ~/.pgpass).
    """
    if not password(storage):
        return storage
    url = make_url(storage).difference_update_query(["password"])
    bare = URL.create(
        url.drivername, url.username, None, url.host, url.port, url.database, url.query
    )
    return bare.render_as_string()
