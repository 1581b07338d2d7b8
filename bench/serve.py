"""`shardit serve` against the offline engine: throughput with many clients, what a request costs beyond its work, how
fast it cancels and comes back, what the API process takes, and what ranks lose to HTTP."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.flood import flood
from bench.served import Connection, Served
from shardit.server.process.api_process import API

MODEL = "wan2.2-t2v"
STAGES = 2
CLIENTS = 8
BLOCK = 16
"""Requests of a turn, short enough that the machine's speed hardly drifts meanwhile."""
REQUESTS = 50
HEALTH_INTERVAL_S = 0.02
CANCEL_AT, LONG = 3, 200
"""A job of `LONG` steps is cancelled after step `CANCEL_AT`."""
FLOODED = 60
"""Steps of the videos that are made while clients flood the API process."""


def measure(rounds: int, requests: int = REQUESTS) -> dict[str, Any]:
    """`requests` of a tiny video model on two stages for each number; throughput in `6 * rounds + 1` turns with the
    offline engine."""
    from shardit import DiffusionParallelConfig, Omni

    os.environ["SHARDIT_PROGRESS"] = "0"
    flags = ("--pipeline-parallel-size", str(STAGES), "--max-in-flight", str(STAGES), "--queue-size", "1000")
    with Served(f"tiny/{MODEL}", *flags) as first:  # writes the checkpoint, warms the disk
        first.wait(lambda: first.answers("/ready"))
    ups = [_up_s(*flags) for _ in range(2 * rounds + 1)]
    turns, block = 6 * rounds + 1, min(BLOCK, requests)
    config = DiffusionParallelConfig(pipeline_parallel_size=STAGES)
    with Served(f"tiny/{MODEL}", *flags) as server:
        server.wait(lambda: server.answers("/ready"))
        start_s = time.monotonic() - server.begun
        with Omni(f"tiny/{MODEL}", parallel_config=config, max_in_flight=STAGES, device="cpu") as omni:
            throughput = _throughput(server, omni, turns, block)
            health = Health(server)
            health.during(lambda: _serve_all(server, block))
            overhead = _overhead(server, omni, requests)
        cancel = _cancel(server, requests)
        flooded = median(_flooded_share(server) for _ in range(2 * rounds + 1))
        rss_mib = server.rss_mib(API)
        restarts = [_restart_s(server) for _ in range(rounds)]
    return {
        "requests": requests,
        "rounds": rounds,
        "clients": CLIENTS,
        "turns": turns,
        "requests_per_turn": block,
        "in_flight": STAGES,
        **throughput,
        **overhead,
        **cancel,
        "health_s": median(begun for begun, _ in ups),
        "api_up_s": median(age for _, age in ups),
        "start_s": start_s,
        "restart_s": median(restarts),
        "restart_beyond_start_s": median(restarts) - start_s,
        "api_rss_mib": rss_mib,
        "health_p95_ms": health.p95_ms(),
        "health_requests": len(health.seconds),
        "flooded_share": flooded,
    }


def _up_s(*flags: str) -> tuple[float, float]:
    """Seconds until /health is answered: from the command, and from the start of the process that answers."""
    with Served(f"tiny/{MODEL}", *flags) as server:
        server.wait(lambda: server.answers("/health"))
        return time.monotonic() - server.begun, server.age_s(API)


def call_of(seed: int, **more: Any) -> dict[str, Any]:
    """The same request for both."""
    from shardit.models import tiny

    return {**tiny.defaults(MODEL), "prompt": f"a cat, number {seed}", "seed": seed, **more}


class Health:
    """Asks for /health again and again while something else goes on."""

    def __init__(self, server: Served):
        self._server = server
        self.seconds: list[float] = []

    def during(self, work: Callable[[], Any]) -> Any:
        """What `work` gives."""
        over = threading.Event()
        thread = threading.Thread(target=self._ask, args=(over,))
        thread.start()
        try:
            return work()
        finally:
            over.set()
            thread.join()

    def p95_ms(self) -> float:
        """Of all answers so far."""
        return sorted(self.seconds)[int(0.95 * (len(self.seconds) - 1))] * 1000

    def _ask(self, over: threading.Event) -> None:
        connection = self._server.connect()
        while not over.wait(HEALTH_INTERVAL_S):
            begin = time.monotonic()
            connection.good("GET", "/health")
            self.seconds.append(time.monotonic() - begin)


@dataclass
class Turn:
    """Seconds for the same requests over HTTP, by `generate`, and by `generate` with the files that the server writes;
    and those that other guests of the machine took meanwhile."""

    served_s: float
    offline_s: float
    saved_s: float
    stolen_s: float

    @property
    def others(self) -> float:
        """Share of all cores that other guests took."""
        return machine.share_of_others(self.served_s + self.saved_s, self.stolen_s, 0.0)


def _throughput(server: Served, omni: Any, turns: int, block: int) -> dict[str, Any]:
    """The server against the offline engine in short turns, in either order, as the speed of a machine that others
    share drifts. Of the turns, the half counts from which others took the least."""
    _turn(server, omni, block, served_first=True)  # warms up both
    all_turns = [_turn(server, omni, block, served_first=number % 2 == 0) for number in range(turns)]
    quiet = sorted(all_turns, key=lambda turn: turn.stolen_s)[: (turns + 1) // 2]
    return {
        "served_s": median(turn.served_s for turn in quiet),
        "offline_s": median(turn.offline_s for turn in quiet),
        "offline_with_files_s": median(turn.saved_s for turn in quiet),
        "throughput_share": median(turn.offline_s / turn.served_s for turn in quiet),
        "throughput_share_with_files": median(turn.saved_s / turn.served_s for turn in quiet),
        "throughput_share_of_all_turns": median(turn.offline_s / turn.served_s for turn in all_turns),
        "throughput_turns": [asdict(turn) for turn in all_turns],
        "most_used_by_others": max(turn.others for turn in quiet),
    }


def _turn(server: Served, omni: Any, block: int, served_first: bool) -> Turn:
    stolen = machine.stolen_seconds()
    served = _serve_all(server, block) if served_first else 0.0
    offline, saved = _generate_all(omni, block)
    if not served_first:
        served = _serve_all(server, block)
    return Turn(served, offline, saved, machine.stolen_seconds() - stolen)


def _serve_all(server: Served, count: int) -> float:
    connections = threading.local()

    def one(seed: int) -> None:
        if not hasattr(connections, "own"):
            connections.own = server.connect()
        connections.own.good("POST", "/v1/videos/sync", call_of(seed))

    begin = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(one, range(count)))
    return time.monotonic() - begin


def _generate_all(omni: Any, count: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        outputs = omni.generate([call_of(seed) for seed in range(count)])
        computed = time.monotonic() - begin
        for number, output in enumerate(outputs):
            output.save(Path(folder) / f"{number}.mp4")
        return computed, time.monotonic() - begin


def _overhead(server: Served, omni: Any, requests: int) -> dict[str, Any]:
    """One client, one request after the other: its time beyond what the ranks needed and the writing of the file."""
    from shardit.server.jobs.store import Store

    store, connection = Store(server.folder), server.connect()
    beyond, saving = [], []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(requests):
                (output,) = omni.generate(call_of(seed))
                begin = time.monotonic()
                output.save(Path(folder) / "one.mp4")
                saving.append(time.monotonic() - begin)
                begin = time.monotonic()
                _, headers = connection.good("POST", "/v1/videos/sync", call_of(seed))
                took = time.monotonic() - begin
                job = store.get(headers["x-shardit-job"])
                assert job is not None
                beyond.append(took - job.details["seconds"] - saving[-1])
    finally:
        store.close()
    return {"overhead_ms": median(beyond) * 1000, "encoding_ms": median(saving) * 1000}


def _cancel(server: Served, requests: int) -> dict[str, Any]:
    """Steps that a job still takes after the answer to its cancelling, and the time until the next has begun."""
    steps, seconds = [], []
    for seed in range(requests):
        done, freed = _cancel_one(server, seed)
        steps.append(done)
        seconds.append(freed)
    return {"cancel_steps": median(steps), "cancel_most_steps": max(steps), "cancel_ms": median(seconds) * 1000}


def _cancel_one(server: Served, seed: int) -> tuple[int, float]:
    from json import loads

    connection = server.connect()
    running, other, waiting = (
        loads(connection.good("POST", "/v1/videos", call_of(seed + number, num_inference_steps=LONG))[0])["id"]
        for number in range(STAGES + 1)
    )
    following = threading.Thread(target=_first_step, args=(server.connect(), waiting, began := []))
    following.start()
    cancelled, after = 0.0, 0
    for name, data, now in server.connect().events(f"/v1/videos/{running}/events"):
        if name == "step" and data["step"] >= CANCEL_AT and not cancelled:
            connection.good("POST", f"/v1/videos/{running}/cancel")
            cancelled = time.monotonic()
        elif name == "step" and cancelled and now > cancelled:
            after += 1
    following.join()
    for job_id in (other, waiting):
        connection.good("DELETE", f"/v1/videos/{job_id}")
    return after, began[0] - cancelled


def _first_step(connection: Connection, job_id: str, began: list[float]) -> None:
    for name, _, now in connection.events(f"/v1/videos/{job_id}/events"):
        if name == "step":
            began.append(now)
            return


def _flooded_share(server: Served) -> float:
    """Seconds that ranks need for videos while the HTTP interface is flooded, over those that they need otherwise."""
    with flood(server.port):
        flooded = _compute_s(server)
    return flooded / _compute_s(server)


def _compute_s(server: Served) -> float:
    """Seconds in the ranks for as many videos as are in flight."""
    from shardit.server.jobs.store import Store

    store = Store(server.folder)
    try:
        call = call_of(0, num_inference_steps=FLOODED)
        with ThreadPoolExecutor(STAGES) as clients:
            answers = clients.map(lambda _: server.connect().good("POST", "/v1/videos/sync", call), range(STAGES))
            jobs = [store.get(headers["x-shardit-job"]) for _, headers in answers]
        return median(job.details["seconds"] for job in jobs if job is not None)
    finally:
        store.close()


def _restart_s(server: Served) -> float:
    """From the SIGKILL of a rank to the next yes of /ready."""
    killed = server.kill_a_rank()
    server.wait(lambda: not server.answers("/ready"))
    server.wait(lambda: server.answers("/ready"))
    return time.monotonic() - killed
