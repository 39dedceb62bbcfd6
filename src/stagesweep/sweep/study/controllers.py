"""Several controllers on one study: a lock to propose under, and signs of life.

With SQLite there is one controller, and all this does nothing. With PostgreSQL there may be any
number, on any machines: what must not happen twice happens under a lock of the server, each
controller says every few seconds that it lives, by the server's clock, and what one that says
nothing more has left under way is taken over by another.
"""

import importlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError

from stagesweep.base.errors import UserError
from stagesweep.sweep.study.storage import OneWriter
from stagesweep.sweep.study.url import password, without_password

if TYPE_CHECKING:
    from optuna import Study

# Seconds between two signs of life, and without one until a controller counts as dead.
BEAT, DEAD = 5.0, 20.0
# A controller that stands still for so long while it holds the lock loses it.
HELD = "120s"


class Sharing:
    """One controller among those of a study."""

    def __init__(self, storage: str) -> None:
        self.url = storage
        self.me = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.shared = storage.startswith("postgresql")
        # How long a wait for events may last, so that what others do is seen.
        self.pause = BEAT if self.shared else None
        self.options: dict[str, Any] = {}
        if self.shared:
            self.options = {"pool_pre_ping": True, **connecting(storage)}
            self.engine = sqlalchemy.create_engine(storage, **self.options)
        # Set when others may have taken this one for dead.
        self.late = threading.Event()

    def storage(self) -> RDBStorage:
        """The study's storage; tables are made where there are none, so hold the lock."""
        if not self.shared:
            return OneWriter(self.url)
        return RDBStorage(self.url, engine_kwargs=dict(self.options))

    def at_once(self, study: "Study") -> AbstractContextManager[None]:
        """A block whose writes to a study are one transaction, where nobody else writes."""
        backend = getattr(study._storage, "_backend", None)
        return backend.at_once() if isinstance(backend, OneWriter) else nullcontext()

    @contextmanager
    def alone(self, what: str = "") -> Iterator[None]:
        """Do something that no other controller does at the same time.

        The lock ends with the transaction, which the server ends when this machine is gone.
        """
        if not self.shared:
            yield
            return
        with self.engine.begin() as connection:
            text = sqlalchemy.text
            connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = '{HELD}'"))
            lock = text("SELECT pg_advisory_xact_lock(hashtext(:name))")
            connection.execute(lock, {"name": f"stagesweep {what}"})
            yield

    @contextmanager
    def joined(self, study: "Study") -> Iterator[None]:
        """A block in which this controller says that it lives; after it, others take over at once
        what it has left.
        """
        if not self.shared:
            yield
            return
        key, ended = self._key(self.me), threading.Event()

        def go_on() -> None:
            latest = time.monotonic()
            while not ended.wait(BEAT):
                try:
                    study.set_user_attr(key, self.now())
                except (StorageInternalError, SQLAlchemyError):
                    continue  # the server is away; whoever needs it will say so
                if time.monotonic() - latest > DEAD:
                    self.late.set()
                latest = time.monotonic()

        study.set_user_attr(key, self.now())
        thread = threading.Thread(target=go_on, name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=DEAD)
            study.set_user_attr(key, 0.0)

    def living(self, study: "Study") -> set[str]:
        """The controllers that live."""
        if not self.shared:
            return {self.me}
        now = self.now()
        beats = {key: at for key, at in study.user_attrs.items() if key.startswith(self._key(""))}
        return {key.removeprefix(self._key("")) for key, at in beats.items() if now - at < DEAD}

    def now(self) -> float:
        """The server's clock: the machines' own may differ."""
        with self.engine.connect() as connection:
            clock = sqlalchemy.text("SELECT extract(epoch FROM clock_timestamp())")
            return float(connection.execute(clock).scalar_one())

    @staticmethod
    def _key(name: str) -> str:
        return f"controller {name}"


def connecting(storage: str) -> dict[str, Any]:
    """Options of the engine: do not wait for ever for a server that does not answer."""
    with explained(storage):
        driver = sqlalchemy.make_url(storage).get_driver_name()
        try:
            importlib.import_module(driver)
        except ModuleNotFoundError as error:
            raise UserError(
                f"hydra.sweeper.storage={without_password(storage)} needs the package {driver}; "
                "pip install 'stagesweep[postgres]', and write postgresql+psycopg://…"
            ) from error
    return {"connect_args": {"connect_timeout": 10}} if driver.startswith("psycopg") else {}


@contextmanager
def explained(storage: str) -> Iterator[None]:
    """Say in one line what is wrong with a server; never its password."""
    try:
        yield
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(
            "hydra.sweeper.storage is no URL of a database that can be used; write "
            "postgresql+psycopg://USER@HOST:PORT/DATABASE"
        ) from error
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
        said = str(cause.orig if isinstance(cause, OperationalError) else cause or error)
        shown = without_password(storage)
        secret = password(storage)
        line = " ".join(said.split("\n")[0].split())
        line = line.replace(secret, "***") if secret else line
        raise UserError(
            f"hydra.sweeper.storage={shown}: {line}; the same command goes on when it works again"
        ) from error
