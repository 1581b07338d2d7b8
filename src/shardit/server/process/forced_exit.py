"""Forced exit if the shutdown of the supervisor takes too long."""

from __future__ import annotations

import os
import signal
import socket
import threading
from typing import Any

EXIT_TIMEOUT_S = 9.0
"""Seconds from the signal to the forced exit: less than the ten seconds that are promised."""
LOG_TIMEOUT_S = 0.2


class ForcedExit:
    """A thread that ends this process `EXIT_TIMEOUT_S` after SIGTERM or Ctrl-C, even if the main thread is stuck (in a
    disk access, a lock of the store, a log that nobody reads). The API process and the ranks end with it, and the next
    start queues their jobs again.

    Create it in the main thread, after that has set handlers for these signals: Python reports no others.
    """

    def __init__(self, log: Any):
        self._log = log
        self._over = threading.Event()
        self._reads, self._writes = socket.socketpair()
        self._writes.setblocking(False)
        # Not the handlers: they run between two steps of the main thread, which may be stuck.
        signal.set_wakeup_fd(self._writes.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def disarm(self) -> None:
        """Cancel the forced exit after a regular shutdown."""
        signal.set_wakeup_fd(-1)
        self._over.set()
        self._writes.close()

    def _watch(self) -> None:
        with self._reads:  # open to the end: Python prints an error for a signal that it cannot write
            signals = self._reads.recv(1)
            if not signals or self._over.wait(EXIT_TIMEOUT_S):
                return
            self._end(signals[0])

    def _end(self, number: int) -> None:
        # In a thread: the log may be stuck, too.
        thread = threading.Thread(target=self._log.error, args=("forced_exit",), daemon=True)
        thread.start()
        thread.join(LOG_TIMEOUT_S)
        os._exit(exit_code(number))


def exit_code(number: int) -> int:
    """Return the exit code of the command after a signal."""
    return 130 if number == signal.SIGINT else 0
