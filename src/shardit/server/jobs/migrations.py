"""The tables of the store, and the migrations from older versions."""

from __future__ import annotations

import sqlite3

STEPS: tuple[str, ...] = (
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        state TEXT NOT NULL,
        request TEXT NOT NULL,
        seed INTEGER NOT NULL,
        view TEXT NOT NULL,
        created_at REAL NOT NULL,
        due REAL NOT NULL,
        owner TEXT,
        waits INTEGER NOT NULL DEFAULT 0,
        inputs TEXT NOT NULL DEFAULT '[]',
        started_at REAL,
        finished_at REAL,
        attempts INTEGER NOT NULL DEFAULT 0,
        cancel_requested INTEGER NOT NULL DEFAULT 0,
        doomed INTEGER NOT NULL DEFAULT 0,
        error TEXT,
        files TEXT NOT NULL DEFAULT '[]',
        facts TEXT NOT NULL DEFAULT '{}',
        bytes INTEGER NOT NULL DEFAULT 0,
        idempotency_key TEXT,
        fingerprint TEXT NOT NULL DEFAULT ''
    );
    CREATE INDEX jobs_by_state ON jobs (state, due, number);
    CREATE UNIQUE INDEX jobs_by_key ON jobs (ifnull(owner, ''), idempotency_key) WHERE idempotency_key IS NOT NULL;
    CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
    """
    ALTER TABLE jobs ADD COLUMN deaths INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE jobs ADD COLUMN deaths_alone INTEGER NOT NULL DEFAULT 0;
    """,
)
"""`STEPS[n]` migrates from version n to n + 1. A released step is never changed."""


def migrate(db: sqlite3.Connection) -> None:
    """Bring the tables up to date, in one transaction. Raises sqlite3.DatabaseError if a newer program made them."""
    if _version(db) == len(STEPS):
        return  # without a write, which a full disk would refuse
    db.execute("BEGIN IMMEDIATE")
    try:
        version = _version(db)
        for step in STEPS[version:]:
            for statement in filter(str.strip, step.split(";")):
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(STEPS)}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection) -> int:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(STEPS):
        raise sqlite3.DatabaseError(f"it was made by a newer shardit (version {version}, this one knows {len(STEPS)})")
    return version
