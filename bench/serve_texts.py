"""`shardit serve` with a language model against `LLM.generate` and one rank: rates and times with several clients, and
what a long prompt does to the texts that run beside it, with chunks and without.

All three are loaded at once and take turns; ranks without work wait at their channels. Clients read streams in threads
of this process.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench import machine
from bench.served import Connection, Served

STAGES = 2
CLIENTS = (1, 4, 16)
LONG = 512
"""Words of the prompt that arrives while texts run."""
RUNNING = 8
CHUNK = 64
"""Tokens of a chunk, as by default on CPUs."""


SENTENCE = """the river ran down from the old hill past the mill and the farm where a man and his son had kept
sheep for many years but in the spring of that year the water rose so high that they had to leave
their home at night with all that they could carry and walk along the road to the next town"""
WORDS = SENTENCE.split()


@dataclass(frozen=True)
class Size:
    """model: its name. prompt: words of each request, nearly all of one token. text: tokens of each answer. per_client:
    requests of each client in a turn. long: words of the long prompt."""

    model: str = "smollm2-135m"
    prompt: int = 32
    text: int = 64
    per_client: int = 2
    long: int = LONG


SMALL = Size("tiny/llama", prompt=8, text=8, per_client=1, long=60)


@dataclass
class Times:
    """Of one request: its start, and when each piece of its text came."""

    begun: float = 0.0
    pieces: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        """Seconds to the first piece."""
        return self.pieces[0] - self.begun

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


def measure(size: Size, rounds: int) -> dict[str, Any]:
    """Rates in `rounds` turns for each number of clients; the long prompt as often."""
    from shardit import LLM

    found: dict[str, Any] = {"model": size.model, "prompt": size.prompt, "text": size.text, "rounds": rounds}
    flags = ("--pipeline-parallel-size", str(STAGES))
    with Served(size.model, *flags) as server:
        server.wait(lambda: server.answers("/ready"))
        with LLM(size.model, pipeline_parallel_size=STAGES) as staged, LLM(size.model) as alone:
            found["clients"] = [_rates(size, server, staged, alone, count, rounds) for count in CLIENTS]
    found["most_used_by_others"] = max(one["most_used_by_others"] for one in found["clients"])
    found["long_prompt"] = {}
    for name, tokens in (("chunks", CHUNK), ("whole", size.long)):
        with Served(size.model, *flags, "--max-num-batched-tokens", str(tokens)) as server:
            server.wait(lambda server=server: server.answers("/ready"))
            found["long_prompt"][name] = _beside_a_long_prompt(size, server, rounds)
    return found


def prompts(size: Size, count: int) -> list[str]:
    """Prompts without a common beginning. Of words: a model continues numbers at random with parts of characters, for
    which a stream waits, so that its pieces would be no steps."""
    return [words(7 * number, size.prompt) for number in range(count)]


def words(start: int, count: int) -> str:
    """Common words, from one of them on."""
    return " ".join(WORDS[(start + place) % len(WORDS)] for place in range(count))


def _rates(size: Size, server: Served, staged: Any, alone: Any, clients: int, rounds: int) -> dict[str, Any]:
    todo = prompts(size, clients * size.per_client)
    kinds: dict[str, Callable[[], Any]] = {
        "streamed": lambda: served(size, server, todo, clients, stream=True),
        "whole": lambda: served(size, server, todo, clients, stream=False),
        "generate": lambda: generated(size, staged, todo, clients),
        "one_rank": lambda: generated(size, alone, todo, clients),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    times: list[Times] = []
    stolen, start = machine.stolen_seconds(), time.monotonic()
    for turn in range(rounds + 1):  # the first one warms up
        for name, kind in kinds.items():
            begin = time.monotonic()
            made = kind()
            if turn:
                seconds[name].append(time.monotonic() - begin)
                times += made if name == "streamed" else []
    tokens = len(todo) * size.text
    others = machine.share_of_others(time.monotonic() - start, machine.stolen_seconds() - stolen, 0.0)
    return {
        "clients": clients,
        "requests": len(todo),
        "most_used_by_others": others,
        "requests_per_s": len(todo) / median(seconds["streamed"]),
        "tokens_per_s": {name: tokens / median(own) for name, own in seconds.items()},
        "share_of_generate": {
            name: median(off / own for off, own in zip(seconds["generate"], seconds[name], strict=True))
            for name in ("streamed", "whole")
        },
        "first_token_s": percentiles([one.first_s for one in times]),
        "token_s": percentiles([gap for one in times for gap in one.gaps]),
        "request_s": percentiles([one.pieces[-1] - one.begun for one in times]),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """The median, and the 95th and 99th percentiles."""
    ordered = sorted(values)
    return {
        name: ordered[int(share * (len(ordered) - 1))] for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }


def body_of(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy completion of a fixed length."""
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}


def served(size: Size, server: Served, todo: list[str], clients: int, *, stream: bool) -> list[Times]:
    """Send requests by several clients, each one after the other; the times of streamed ones."""
    own = threading.local()

    def one(prompt: str) -> Times:
        if not hasattr(own, "connection"):
            own.connection = server.connect()
        if stream:
            return streamed(own.connection, body_of(prompt, size.text, stream=True))
        own.connection.good("POST", "/v1/completions", body_of(prompt, size.text))
        return Times()

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(one, todo))


def streamed(connection: Connection, body: dict[str, Any], until: threading.Event | None = None) -> Times:
    """Read a stream to its end, or until an event is set; then the connection is closed."""
    http, times = connection.http, Times(time.monotonic())
    http.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = http.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status} {answer.read()[:500]!r}")
    while line := answer.readline():
        if line.startswith(b"data: {"):
            times.pieces.append(time.monotonic())
        if until is not None and until.is_set():
            http.close()
            break
    return times


def generated(size: Size, llm: Any, todo: list[str], clients: int) -> None:
    """The same requests by `LLM.generate`, as many at a time."""
    from shardit import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=size.text, ignore_eos=True)
    for at in range(0, len(todo), clients):
        llm.generate(todo[at : at + clients], params, use_tqdm=False)


def _beside_a_long_prompt(size: Size, server: Served, rounds: int) -> dict[str, float]:
    """Running texts while a long prompt arrives: their usual step and their longest one then, the time to the first
    token of the long prompt, and the time of one chunk alone, the first and the last one of a prompt."""
    chunk = [streamed(server.connect(), body_of(words(n, CHUNK), 1, stream=True)).first_s for n in range(rounds + 1)]
    last = [_last_chunk(size, server, number) for number in range(rounds + 1)]
    rows = [_one_long_prompt(size, server, number) for number in range(rounds + 1)][1:]
    names = ("usual_step_s", "longest_step_s", "first_token_s")
    found = {name: median(row[place] for row in rows) for place, name in enumerate(names)}
    found["lengthened_by_s"] = median(row[1] - row[0] for row in rows)
    return {**found, "chunk_alone_s": median(chunk[1:]), "last_chunk_s": median(last[1:])}


def _last_chunk(size: Size, server: Served, number: int) -> float:
    """Return the time to the first token of a long prompt of which all but the last chunk has been computed before."""
    begin, most = f"Case {number}", max(size.long - CHUNK, 1)
    head = f"{begin} {words(number, most)}"
    whole = f"{begin} {words(number, most + CHUNK - 4)}"  # a few words are two tokens
    streamed(server.connect(), body_of(head, 1, stream=True))
    return streamed(server.connect(), body_of(whole, 1, stream=True)).first_s


def _one_long_prompt(size: Size, server: Served, number: int) -> tuple[float, float, float]:
    over = threading.Event()
    with ThreadPoolExecutor(RUNNING) as pool:
        running = [
            pool.submit(streamed, server.connect(), body_of(one, 200, stream=True), over)
            for one in prompts(size, RUNNING)
        ]
        time.sleep(0.5 + 0.1 * size.text)
        prompt = words(5 * number + 33, size.long)  # no running prompt begins there
        long = streamed(server.connect(), body_of(prompt, 2, stream=True))
        over.set()
        times = [one.result() for one in running]
    before, during = [], []
    for one in times:
        for begin, end in zip(one.pieces, one.pieces[1:], strict=False):
            (during if end > long.begun and begin < long.pieces[0] else before).append(end - begin)
    usual = median(before)
    return usual, max(during, default=usual), long.first_s
