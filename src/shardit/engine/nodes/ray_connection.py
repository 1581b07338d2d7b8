"""The connection of a supervisor to Ray: to a running cluster, or to one that is started for it alone."""

from __future__ import annotations

import logging
import os
import socket
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from shardit.errors import InputError

CONNECT_TIMEOUT_S = 10.0


class RayConnection:
    """Connects to the cluster of RAY_ADDRESS or a cluster running on this machine, else starts one on this machine.

    A process has one connection to Ray, which all objects of this class share; the last one to close leaves the
    cluster, unless the program itself had connected before.

    Ray asks the kernel to end the processes of a cluster that it starts together with the *thread* that has started
    them. So that thread waits here until the last `close`, regardless of the thread that opened the connection.
    """

    _lock = threading.Lock()
    _users = 0
    _over: threading.Event | None = None
    """Ends the thread that has connected; None if the program itself has."""

    def __init__(self) -> None:
        self.is_open = False

    def open(self) -> Any:
        """Return the module `ray`, connected. Raises InputError if there is no usable cluster."""
        _set_up()
        import ray

        shared = RayConnection
        with shared._lock:
            if not ray.is_initialized():
                connected: Future[None] = Future()
                over = threading.Event()
                threading.Thread(target=_stay_connected, args=(connected, over), daemon=True).start()
                connected.result()
                shared._over = over
            if not self.is_open:
                self.is_open = True
                shared._users += 1
        return ray

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        shared = RayConnection
        with shared._lock:
            if not self.is_open:
                return
            self.is_open = False
            shared._users -= 1
            if shared._users or shared._over is None:
                return
            import ray

            ray.shutdown()
            shared._over.set()
            shared._over = None


def _stay_connected(connected: Future[None], over: threading.Event) -> None:
    """Connect, and wait until the connection is closed."""
    try:
        _connect()
    except BaseException as error:  # it is for the thread that waits
        connected.set_exception(error)
    else:
        connected.set_result(None)
        over.wait()


def one_line(error: BaseException) -> str:
    """Return an error of Ray in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray puts the remote traceback first; its last line has the cause.
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _set_up() -> None:
    """Set the environment; to be called before Ray is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a server does not report its start to anyone
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")  # SIGTERM is no failure


def _connect() -> None:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise InputError(
            f"RAY_ADDRESS={address} is for clients outside the cluster; start shardit on a node of it, "
            "with RAY_ADDRESS=auto"
        )
    logging.getLogger("ray").setLevel(logging.ERROR)
    file = _address_file()
    noted = file.read_text("utf-8").strip() if not address and file.is_file() else ""
    try:
        _check_answers(address or noted)
        ray.init(namespace="shardit", include_dashboard=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        left = f"at {noted}, which {file} names (remove it, or start Ray again)" if noted else "here"
        place = f"at RAY_ADDRESS={address}" if address else left
        raise InputError(f"there is no Ray cluster {place} that can be used ({one_line(error)})") from None


def _address_file() -> Path:
    """Return the file in which Ray has the address of the cluster that was started last on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")


def _check_answers(address: str | None) -> None:
    """Raise OSError if HOST:PORT does not answer: Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
