"""The API process."""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import signal
import socket
import sqlite3

import uvicorn
from fastapi import FastAPI

from shardit.engine.process.channel import Channel, Closed
from shardit.engine.process.process import die_with_parent, lower_session_priority
from shardit.logs import logger, take_over
from shardit.server.http.app import create_app
from shardit.server.http.state import model_info
from shardit.server.http.state.live_state import Info, LiveState
from shardit.server.http.state.supervisor_client import SupervisorClient
from shardit.server.http.timeouts import IdleTimeoutProtocol
from shardit.server.jobs.store import Store
from shardit.server.options import ServeOptions

_LOG = logger("api")
_GRACE_S = 2
"""Time limit for unfinished answers once the process is asked to exit, in seconds."""


def main(control_fd: int, listen_fd: int) -> None:
    """Serve on the listening socket `listen_fd` until SIGTERM, or until the supervisor at the other end of the socket
    `control_fd` is gone. The first message from there is the `ServeOptions`."""
    die_with_parent(signal.SIGKILL)  # also while it is stopped, or hangs
    channel = Channel(socket.socket(fileno=control_fd))
    listener = socket.socket(fileno=listen_fd)
    try:
        options = channel.recv()
    except Closed:  # the command was wrong
        return
    assert isinstance(options, ServeOptions), options
    store = Store(options.data_dir)
    asyncio.run(_serve(options, store, SupervisorClient(channel, _supervisor_gone), listener))


async def _serve(options: ServeOptions, store: Store, link: SupervisorClient, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()

    def store_info(reported: Info) -> None:
        try:
            model_info.remember(store, options.model, reported)
        except sqlite3.Error as error:
            _LOG.error("storage", error=str(error))

    def keep(reported: Info) -> None:
        loop.run_in_executor(None, store_info, reported)

    live_state = LiveState(
        link.send,
        info=model_info.recall(store, options.model),
        on_info=keep,
        read_info=functools.partial(model_info.from_files, options.model, options.of_language),
    )
    link.start(loop, live_state.deliver)
    try:
        dropped = await loop.run_in_executor(None, store.drop_waiting)
    except sqlite3.Error as error:  # a full disk, for example: requests report it
        _LOG.error("storage", error=str(error))
        dropped = 0
    if dropped:
        _LOG.info("dropped", jobs=dropped, reason="their clients waited on a connection that is gone")
        live_state.wake()
    take_over(_LOG)
    app = create_app(options, store, live_state)
    server = _Server(_config(app), live_state)
    gc.freeze()
    gc.enable()  # it was off during the imports
    if options.of_language:
        app.state.texts.load()
    lower_session_priority()  # only now, to keep the start quick
    await server.serve(sockets=[listener])


def _config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=IdleTimeoutProtocol,
        log_config=None,
        access_log=False,
        log_level="warning",
        lifespan="off",
        workers=1,  # otherwise uvicorn reads WEB_CONCURRENCY, which concerns other servers
        server_header=False,
        timeout_graceful_shutdown=_GRACE_S,
        timeout_keep_alive=30,
    )


class _Server(uvicorn.Server):
    """Notifies requests that wait for jobs of the shutdown; otherwise they would use the whole grace period."""

    def __init__(self, config: uvicorn.Config, live_state: LiveState):
        super().__init__(config)
        self._live_state = live_state

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, then report it."""
        await super().startup(sockets)
        for host, port, *_ in (listener.getsockname() for listener in sockets or ()):
            _LOG.info("listening", host=host, port=port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer pending requests if possible, then stop."""
        self._live_state.stop()
        await super().shutdown(sockets)


def _supervisor_gone() -> None:
    # Without it nothing works, and another server may be waiting for the address.
    _LOG.error("supervisor_gone")
    os._exit(1)
