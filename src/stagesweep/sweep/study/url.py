"""The address of a study's database, and its password."""

from sqlalchemy import make_url


def password(storage: str) -> str:
    """The password in the URL of a storage, or nothing."""
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(storage)
    except ArgumentError:
        return ""
    return str(url.password or url.query.get("password") or "")


def without_password(storage: str) -> str:
    """The URL of a storage as it may be shown and written down: the driver finds the password
    elsewhere (PGPASSWORD, ~/.pgpass).
    """
    if not password(storage):
        return storage
    from sqlalchemy import URL

    url = make_url(storage).difference_update_query(["password"])
    bare = URL.create(
        url.drivername, url.username, None, url.host, url.port, url.database, url.query
    )
    return bare.render_as_string()
