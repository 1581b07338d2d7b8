"""`shardit serve`: acquires the data folder and the socket for its lifetime, and starts the processes that use them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shardit.errors import InputError
from shardit.server.options import DATABASE, ServeOptions
from shardit.server.process import api_process
from shardit.settings.paths import check_name, model_files

if TYPE_CHECKING:
    from shardit.engine.process.placement import Placement

PORT_RELEASE_TIMEOUT_S = 6.0
"""Seconds for the processes of a killed server to release the port."""

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def serve(options: ServeOptions, placement: Placement | None = None, grace_s: float = 0.0) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code. Raises InputError for errors that the user can correct.

    grace_s: wait for the data folder, in seconds, if an exiting server may still hold it.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the supervisor sets its own handler
    with (
        locked(options.data_dir, grace_s) as was_killed,
        listening(options.host, options.port, PORT_RELEASE_TIMEOUT_S if was_killed else 0.0) as listener,
        api_process.started(listener) as api,  # it takes longest to import, so it begins before the rest is imported
    ):
        import sqlite3

        from shardit.server.supervisor.supervisor import Supervisor

        try:
            return Supervisor(options, api, listener, placement or _placement_for(options)).run()
        except sqlite3.Error as error:
            text = f"the data folder {options.data_dir} cannot be written ({error}); make it writable or choose another"
            raise InputError(text) from error


def _placement_for(options: ServeOptions) -> Placement:
    if options.executor == "ray":
        from shardit.engine.nodes.ray_placement import RayPlacement

        return RayPlacement(options.num_nodes, "--executor ray")
    from shardit.engine.process.placement import LocalPlacement

    return LocalPlacement(options.step_timeout_s)


@contextlib.contextmanager
def listening(host: str, port: int, grace_s: float = 0.0) -> Iterator[socket.socket]:
    """Open a listening TCP socket. Raises InputError if the address is unavailable for `grace_s` seconds."""
    deadline = time.monotonic() + grace_s
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while True:
            try:
                listener.bind((host, port))
                listener.listen(512)
                break
            except OverflowError:
                raise InputError(f"--port must be from 0 to 65535, got {port}") from None
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                    flag = "--host" if isinstance(error, socket.gaierror) or error.errno in _NOT_HERE else "--port"
                    text = f"cannot listen on {host}:{port} ({error.strerror}); choose another with {flag}"
                    raise InputError(text) from None
                time.sleep(0.1)
        yield listener


def _check_apart(folder: Path) -> None:
    """Raise InputError for a folder that holds a model, and for one within the data folder of a server."""
    if files := model_files(folder):
        raise InputError(f"the data folder {folder} holds a model ({files[0]}); choose another with --data-dir")
    for parent in folder.resolve().parents:
        if os.access(parent, os.X_OK) and (parent / DATABASE).is_file():
            text = f"the data folder {folder} lies in that of a server, {parent}; choose another with --data-dir"
            raise InputError(text)


@contextlib.contextmanager
def locked(folder: Path, grace_s: float = 0.0) -> Iterator[bool]:
    """Lock the data folder for this server; yields whether the previous server was killed, so that its processes may
    still be running. Raises InputError if another server holds the folder for `grace_s` seconds."""
    deadline = time.monotonic() + grace_s
    check_name("data folder", folder)
    _check_apart(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _acquire(folder / "lock", deadline)
    except OSError as error:
        raise InputError(
            f"the data folder {folder} cannot be used ({error.strerror}); choose another with --data-dir"
        ) from None
    if handle is None:
        raise InputError(f"the data folder {folder} is used by another server; choose another with --data-dir")
    try:
        was_killed = bool(os.read(handle, 1))
        with contextlib.suppress(OSError):  # a full disk
            os.write(handle, b"in use")
        try:
            yield was_killed
        except (InputError, SystemExit):
            _release(folder, made)
            raise
        _release(folder, made)
    finally:
        os.close(handle)


def _acquire(path: Path, deadline: float) -> int | None:
    """Return a locked handle of a file, which is created if missing; None if another process keeps it locked."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous server removes the file at its exit: a lock on a removed file excludes nobody.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except OSError:
            if time.monotonic() >= deadline:
                os.close(handle)
                return None
            time.sleep(0.1)
        os.close(handle)


def _release(folder: Path, made: bool) -> None:
    """Remove the lock, and the folder if this start created it and left it empty."""
    with contextlib.suppress(OSError):
        (folder / "lock").unlink()
        if made:
            folder.rmdir()
