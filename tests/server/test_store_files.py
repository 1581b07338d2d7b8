"""The store's files: of older and newer versions, on disks that are full or cannot be written."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shardit.errors import InputError
from shardit.server.jobs import migrations
from shardit.server.jobs.store import Store
from tests.support.stores import FORK, folders, job, new, order, put


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "data")
    yield store
    store.close()


def in_child(work: Callable[[], Any]) -> Any:
    """Return the result of `work` in a forked process, whose limits and user it may change. It must not use our
    connection."""
    ours, theirs = FORK.Pipe()

    def run() -> None:
        try:
            theirs.send(work())
        except BaseException as error:
            theirs.send(error)

    process = FORK.Process(target=run)
    process.start()
    theirs.close()
    try:
        assert ours.poll(60), "the child says nothing"
        answer = ours.recv()
    finally:
        process.join(10)
        process.kill()
    if isinstance(answer, BaseException):
        raise answer
    return answer


# Older and newer stores.

VERSION_1 = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, state TEXT NOT NULL,
    request TEXT NOT NULL, seed INTEGER NOT NULL, view TEXT NOT NULL, created_at REAL NOT NULL, due REAL NOT NULL,
    owner TEXT, waits INTEGER NOT NULL DEFAULT 0, inputs TEXT NOT NULL DEFAULT '[]', started_at REAL, finished_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0, cancel_requested INTEGER NOT NULL DEFAULT 0,
    doomed INTEGER NOT NULL DEFAULT 0, error TEXT, files TEXT NOT NULL DEFAULT '[]', facts TEXT NOT NULL DEFAULT '{}',
    bytes INTEGER NOT NULL DEFAULT 0, idempotency_key TEXT, fingerprint TEXT NOT NULL DEFAULT ''
);
CREATE INDEX jobs_by_state ON jobs (state, due, number);
CREATE UNIQUE INDEX jobs_by_key ON jobs (ifnull(owner, ''), idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO jobs (id, kind, state, request, seed, view, created_at, due, idempotency_key, fingerprint, attempts)
    VALUES ('video_1', 'video', 'in_progress', '{"prompt": "a cat"}', 3, '{}', 5.0, 6.0, 'k', 'f', 2);
INSERT INTO jobs (id, kind, state, request, seed, view, created_at, due, files, bytes)
    VALUES ('image_2', 'image', 'completed', '{"prompt": "a dog"}', 4, '{"n": 1}', 7.0, 8.0, '["output.png"]', 9);
INSERT INTO facts VALUES ('speed', '0.5');
PRAGMA user_version = 1;
"""


def of_version_1(folder: Path) -> None:
    (folder / "jobs" / "video_1").mkdir(parents=True)
    with sqlite3.connect(folder / "jobs.sqlite") as db:
        db.executescript(VERSION_1)
    db.close()


def version(folder: Path) -> int:
    db = sqlite3.connect(folder / "jobs.sqlite")
    try:
        return db.execute("PRAGMA user_version").fetchone()[0]
    finally:
        db.close()


def test_a_store_of_version_1_goes_on(tmp_path: Path) -> None:
    of_version_1(tmp_path)
    store = Store(tmp_path)
    (again,) = store.recover()
    assert (again.id, again.seed, again.attempts, again.deaths) == ("video_1", 3, 2, 0)
    assert order(store) == ["video_1"]
    assert job(store, "image_2").files == ("output.png",)
    assert store.recall("speed") == 0.5
    same, is_new = store.accept(new(idempotency_key="k", fingerprint="f"), queue_size=1)
    assert (same.id, is_new) == ("video_1", False)
    later = put(store)
    assert job(store, later).number > job(store, "image_2").number
    store.close()
    assert version(tmp_path) == len(migrations.STEPS)


def test_a_further_step_reaches_a_store_with_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    before = job(store, put(store))
    store.close()
    step = "ALTER TABLE jobs ADD COLUMN note TEXT NOT NULL DEFAULT 'none'; CREATE TABLE more (x)"
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, step))
    store = Store(tmp_path)
    assert job(store, before.id) == before
    assert store._db.all("SELECT note FROM jobs")[0][0] == "none"
    store.close()
    assert version(tmp_path) == len(migrations.STEPS)


def test_a_step_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_version_1(tmp_path)
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, "CREATE TABLE more (x); SELECT nonsense"))
    with pytest.raises(InputError, match="nonsense"):
        Store(tmp_path)
    assert version(tmp_path) == 1
    monkeypatch.undo()
    store = Store(tmp_path)
    assert order(store) == []
    assert len(store.recover()) == 1
    store.close()


def test_a_newer_store_is_left_alone(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InputError, match="newer shardit") as caught:
        Store(tmp_path)
    assert "\n" not in str(caught.value)
    assert version(tmp_path) == 99


def test_many_processes_make_one_store(tmp_path: Path) -> None:
    def open_and_put() -> None:
        store = Store(tmp_path)
        put(store)
        store.close()

    processes = [FORK.Process(target=open_and_put) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6
    store = Store(tmp_path)
    assert len(order(store)) == 6
    store.close()


# Disks.


def full(store: Store) -> Callable[[], None]:
    """Prevent the database from growing; returns a function that undoes this."""
    pages = store._db.connection.execute("PRAGMA page_count").fetchone()[0]
    store._db.connection.execute(f"PRAGMA max_page_count={pages}")
    return lambda: store._db.connection.execute("PRAGMA max_page_count=1000000") and None


def test_a_full_disk_loses_nothing(store: Store) -> None:
    running = put(store)
    store.start(running)
    let_go = full(store)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.accept(new(fingerprint="x" * 10**5), queue_size=10**6)
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.finish(running, "failed", error={"message": "x" * 10**5})
    assert job(store, running).state == "in_progress"
    assert folders(store) == {running, *order(store)}
    let_go()
    assert store.finish(running, "failed", error={"message": "x" * 10**5})
    other = Store(store.folder)
    assert job(other, running).state == "failed"  # it was committed
    other.close()


def test_a_commit_that_fails_is_no_commit(store: Store) -> None:
    """After a failed COMMIT the next change stands on its own."""
    job_id = put(store)
    store._db.connection.execute("CREATE TABLE parents (x PRIMARY KEY)")
    store._db.connection.execute("CREATE TABLE children (x REFERENCES parents DEFERRABLE INITIALLY DEFERRED)")
    store._db.connection.execute("PRAGMA foreign_keys=ON")
    with pytest.raises(sqlite3.IntegrityError):
        store._db.change("INSERT INTO children VALUES (?)", 1)
    assert store.start(job_id)
    other = Store(store.folder)
    assert job(other, job_id).state == "in_progress"
    other.close()


def test_a_disk_without_room_for_a_file(tmp_path: Path) -> None:
    """Of the whole process, as a quota would: neither half a picture nor half a job is left."""
    folder = tmp_path / "data"
    Store(folder).close()

    def accept() -> Any:
        store = Store(folder)
        kept = put(store, inputs={"0.png": b"x" * 100})
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            store.accept(new(inputs={"0.png": b"x" * 10**6}), queue_size=9)
        except OSError as error:
            return kept, error.errno, folders(store), order(store)
        return "it was accepted"

    kept, _, left, queue = in_child(accept)
    assert (left, queue) == ({kept}, [kept])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another with --data-dir") as caught:
        Store(tmp_path / "file" / "data")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_folders_that_are_read_only(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    store = Store(folder)
    put(store)
    store.close()
    for path in (folder / "jobs").iterdir():
        path.chmod(0o555)
    for path in (folder / "jobs", folder):
        path.chmod(0o555)

    def as_nobody() -> str:
        os.setuid(65534)
        try:
            Store(folder)
        except InputError as error:
            return str(error)
        return "it was opened"

    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(0o755)
    text = in_child(as_nobody)
    assert "cannot be used" in text
    assert "--data-dir" in text
    assert "\n" not in text


def test_files_that_are_not_databases(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_text("no database, but a text that is long enough to be taken for one" * 50)
    with pytest.raises(InputError, match="not a database"):
        Store(tmp_path)
