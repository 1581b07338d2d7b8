"""The store's SQLite file: one connection for all threads of a process, and transactions."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardit.server.jobs.migrations import migrate

BUSY_TIMEOUT_S = 10.0
"""Longest wait for the other process's transaction, in seconds; each takes milliseconds."""


class Database:
    """The tables of `migrations.py` in a file. Raises sqlite3.Error if it cannot be used."""

    def __init__(self, path: Path):
        self._lock = threading.RLock()
        self.connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        self.connection.row_factory = sqlite3.Row
        self.connection.execute("PRAGMA journal_mode=WAL")
        migrate(self.connection)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self.connection.close()

    def one(self, sql: str, *values: Any) -> sqlite3.Row | None:
        """Return the first row of an answer."""
        with self._lock:
            return self.connection.execute(sql, values).fetchone()

    def all(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Return all rows of an answer."""
        with self._lock:
            return self.connection.execute(sql, values).fetchall()

    def change(self, sql: str, *values: Any, durable: bool = True) -> int:
        """Write, in the transaction that is open or in one of its own; returns the number of changed rows."""
        with self.transaction(durable):
            return self.connection.execute(sql, values).rowcount

    @contextmanager
    def transaction(self, durable: bool = True) -> Iterator[None]:
        """Run everything inside at once or not at all. The first to begin locks the file.

        durable: written to the disk at the end, as an answer to a client is a promise. If not, a power failure may lose
        the change; a killed process does not.
        """
        with self._lock:
            if self.connection.in_transaction:  # part of a larger change
                yield
                return
            self.connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:  # a full disk may have ended it already
                    self.connection.execute("ROLLBACK")
                raise
