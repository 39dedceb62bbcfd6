"""Coordinates several controllers on one study: a lock, and heartbeats.

With SQLite there is one controller, and nothing to coordinate. With PostgreSQL there may be any
number, on any machines. Trials are proposed under a lock of the server. Each controller records a
heartbeat every few seconds, by the server's clock. The running trials of a controller without a
heartbeat are taken over by another.
"""

import importlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, get_storage
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError, SQLAlchemyError

from stagesweep.base.errors import EnvironmentFailure, UserError, reason
from stagesweep.sweep.study.storage import (
    SingleWriterStorage,
    damaged,
    open_database,
    reopen_failed,
)
from stagesweep.sweep.study.url import password, without_password

if TYPE_CHECKING:
    from optuna import Study

# Seconds between two heartbeats, and without one until a controller counts as dead.
HEARTBEAT_INTERVAL, GRACE_PERIOD = 5.0, 20.0
# A controller that is suspended for this long while it holds the lock loses the lock.
LOCK_TIMEOUT = "120s"


class Coordinator:
    """Coordinates this controller with the others of a study."""

    def __init__(self, storage: str) -> None:
        self.url = storage
        self.controller_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.shared = storage.startswith("postgresql")
        # The longest wait for events, after which the study is looked at again.
        self.poll_interval = HEARTBEAT_INTERVAL if self.shared else None
        self.options: dict[str, Any] = {}
        if self.shared:
            self.options = {"pool_pre_ping": True, **connect_options(storage)}
            self.engine = sqlalchemy.create_engine(storage, **self.options)
        # Set when this controller was suspended for so long that others may count it as dead.
        self.missed_heartbeat = threading.Event()

    def open_storage(self) -> BaseStorage:
        """Open the storage of the study. Hold the lock: this creates missing tables."""
        if not self.shared:
            return SingleWriterStorage(self.url)
        return get_storage(open_database(self.url, **self.options))

    def reopen_failed(self, study_name: str) -> list[int]:
        """Make the failed trials of a study running ones again; returns their numbers.

        Hold the lock. Other controllers that run at the moment do not see it.
        """
        engine = self.engine if self.shared else open_database(self.url).engine
        if not sqlalchemy.inspect(engine).has_table("trials"):
            return []
        return reopen_failed(engine, study_name)

    @contextmanager
    def lock(self, name: str = "") -> Iterator[None]:
        """Hold a lock that only one controller has at a time.

        The server releases it when this machine is gone, since it belongs to a transaction.
        """
        if not self.shared:
            yield
            return
        with self.engine.begin() as connection:
            text = sqlalchemy.text
            connection.execute(
                text(f"SET LOCAL idle_in_transaction_session_timeout = '{LOCK_TIMEOUT}'")
            )
            lock = text("SELECT pg_advisory_xact_lock(hashtext(:name))")
            connection.execute(lock, {"name": f"stagesweep {name}"})
            yield

    @contextmanager
    def heartbeat(self, study: "Study") -> Iterator[None]:
        """Record heartbeats during the block. After it, others take over what is left at once."""
        if not self.shared:
            yield
            return
        key, ended = self._key(self.controller_id), threading.Event()

        def beat() -> None:
            latest = time.monotonic()
            while not ended.wait(HEARTBEAT_INTERVAL):
                try:
                    study.set_user_attr(key, self.server_time())
                except (StorageInternalError, SQLAlchemyError):
                    continue  # the server is away: the next write of the controller reports it
                if time.monotonic() - latest > GRACE_PERIOD:
                    self.missed_heartbeat.set()
                latest = time.monotonic()

        study.set_user_attr(key, self.server_time())
        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=GRACE_PERIOD)
            study.set_user_attr(key, 0.0)

    def live_controllers(self, study: "Study") -> set[str]:
        """The ids of the controllers with a recent heartbeat."""
        if not self.shared:
            return {self.controller_id}
        now = self.server_time()
        beats = {key: at for key, at in study.user_attrs.items() if key.startswith(self._key(""))}
        return {
            key.removeprefix(self._key("")) for key, at in beats.items() if now - at < GRACE_PERIOD
        }

    def server_time(self) -> float:
        """Seconds by the server's clock, since the clocks of machines differ."""
        with self.engine.connect() as connection:
            clock = sqlalchemy.text("SELECT extract(epoch FROM clock_timestamp())")
            return float(connection.execute(clock).scalar_one())

    @staticmethod
    def _key(name: str) -> str:
        return f"controller {name}"


def connect_options(storage: str) -> dict[str, Any]:
    """Options of the SQLAlchemy engine, with a limit on the time to connect."""
    with storage_errors(storage):
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
def storage_errors(storage: str) -> Iterator[None]:
    """Turn errors of the database into a UserError of one line, without the password."""
    try:
        yield
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(
            "hydra.sweeper.storage is not the URL of a usable database; write "
            "postgresql+psycopg://USER@HOST:PORT/DATABASE"
        ) from error
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = error if isinstance(error, SQLAlchemyError) else error.__cause__
        said = str(cause.orig if isinstance(cause, OperationalError) else cause or error)
        shown = without_password(storage)
        secret = password(storage)
        line = " ".join(said.split("\n")[0].split())
        line = line.replace(secret, "***") if secret else line
        passes = reason(error) == EnvironmentFailure.reason or "locked" in line
        if storage.startswith("sqlite") and not passes:
            raise damaged(storage, line) from error
        raise EnvironmentFailure(
            f"hydra.sweeper.storage={shown}: {line}; when it works again, run the same command to "
            "resume"
        ) from error
