"""Two ranks with one thread each against plain diffusers on one rank with one thread, the same work."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from bench import machine
from bench.model import Size
from bench.peers import PEERS, not_installed
from bench.ranks import Ranks

RANKS = 2
SEEDS = (1, 2, 3, 4)
WRONG = 5e-4
"""A peer whose latents differ more than this from those of plain diffusers (relative L2) is not timed."""


@dataclass(frozen=True)
class Case:
    """Requests in flight at once, with or without guidance, on two ranks of one axis of DiffusionParallelConfig.

    chunks: None is automatic (looped), 1 contiguous; for stages. peer: it is run by this one of `peers.PEERS` instead.
    """

    requests: int
    guided: bool
    chunks: int | None = None
    axis: str = "pipeline_parallel_size"
    peer: str | None = None

    @property
    def name(self) -> str:
        """As it stands in the table."""
        if self.peer is not None:
            return self.peer
        guided = "guidance" if self.guided else "no guidance"
        how = self.axis.partition("_")[0]
        if how == "pipeline":
            how = "automatic" if self.chunks is None else "contiguous"
        return f"{self.requests} x {guided}, {how}"

    @property
    def session(self) -> str:
        """The session, or the peer, that runs it."""
        if self.peer is not None:
            return self.peer
        return f"{self.axis} chunks={self.chunks} in_flight={self.requests}"

    @property
    def command(self) -> str:
        """What a rank is told to run it."""
        return "run_session" if self.peer is None else "run_peer"

    @property
    def ranks(self) -> int:
        """How many ranks run it."""
        return RANKS if self.peer is None else PEERS[self.peer].ranks

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of DiffusionParallelConfig."""
        return {self.axis: RANKS, "pipeline_chunks": self.chunks}


STAGES = (
    Case(1, True, 1),
    Case(1, True, None),
    Case(2, True, None),
    Case(4, True, None),
    Case(1, False, None),
    Case(2, False, None),
    Case(4, False, None),
    Case(4, False, 1),
)
AXES = (
    Case(1, True, axis="cfg_parallel_size"),
    Case(2, True, axis="data_parallel_size"),
    Case(1, True, axis="ulysses_degree"),
    Case(1, True, axis="ring_degree"),
    Case(1, True, axis="tensor_parallel_size"),
    *(Case(1, True, axis="none", peer=name) for name in PEERS),
)


@dataclass(frozen=True)
class Run:
    """One timed run: seconds from the first start to the last end over all ranks, and what it took beside time."""

    seconds: float
    others: float
    cpu_s: list[float]
    sys_s: list[float]
    faults: list[int]
    digests: list[str]
    sent_bytes: list[int]
    latents: list[Any]


@dataclass(frozen=True)
class Made:
    """What plain diffusers made of a request."""

    digest: str
    latents: Any


def measure(size: Size, folder: str, rounds: int, timeout_s: float, cases: tuple[Case, ...] = STAGES) -> dict[str, Any]:
    """All cases in `rounds` rounds; in each of them plain diffusers runs before the cases it is compared with.

    Plain diffusers has processes of its own: gloo's threads in a rank wake up a hundred times a second.
    """
    runs: dict[str, list[Run]] = defaultdict(list)
    expected: dict[tuple[bool, int], Made] = {}
    with Ranks(RANKS) as ranks, Ranks(RANKS) as copies:
        copies.call("open_plain", folder)
        cases, chunks, skipped = _open_cases(ranks, copies, cases, folder, replace(size, steps=1))
        for number in range(rounds):
            seed = SEEDS[number % len(SEEDS)]
            for guided in (True, False):
                plain = _plain_name(guided)
                run = timed(lambda: copies.call("run_plain", size, (seed,), guided, on=(0,)), timeout_s)  # noqa: B023
                runs[plain].append(run)
                expected[(guided, seed)] = Made(run.digests[0], run.latents[0])
                if guided:
                    run = timed(lambda: copies.call("run_plain", size, (seed,), True), timeout_s)  # noqa: B023
                    runs["two copies"].append(run)
                for case in cases:
                    if case.guided == guided:
                        seeds = SEEDS[: case.requests]
                        on = tuple(range(case.ranks))
                        act = lambda: ranks.call(case.command, case.session, size, seeds, case.guided, on=on)  # noqa: B023, E731
                        runs[case.name].append(timed(act, timeout_s))
            print(f"round {number + 1} of {rounds}", _line(runs), file=sys.stderr, flush=True)
        for guided in (True, False):  # seeds that no round has reached
            for seed in SEEDS:
                if (guided, seed) not in expected:
                    found = copies.call("run_plain", size, (seed,), guided, on=(0,))[0]
                    expected[(guided, seed)] = Made(*found["outputs"][0][1:])
    return {**summary(size, runs, chunks, expected, cases), "skipped": skipped}


def _open_cases(
    ranks: Ranks, copies: Ranks, cases: tuple[Case, ...], folder: str, one_step: Size
) -> tuple[tuple[Case, ...], dict[str, int], dict[str, str]]:
    """Load and run once all that runs the cases; those that can be timed, chunks by session, others with reasons."""
    [made, *_] = copies.call("run_plain", one_step, SEEDS[:1], True)
    plain = [Made(*made["outputs"][0][1:])]
    chunks, skipped = {}, {}
    for case in cases:
        if case.peer is None:
            chunks[case.session] = _open(ranks, case, folder, one_step)
        elif why := _open_peer(ranks, case.peer, folder, one_step, plain):
            skipped[case.name] = why
            print(f"{case.name} is skipped: {why}", file=sys.stderr, flush=True)
    return tuple(case for case in cases if case.name not in skipped), chunks, skipped


def _open(ranks: Ranks, case: Case, folder: str, one_step: Size) -> int:
    """Load what runs a case on all ranks and run it once; chunks for each of them."""
    chunks = ranks.call("open_session", case.session, folder, case.config, case.requests)[0]["chunks"]
    # the first calls of a signature find the plan and check it
    ranks.call("run_session", case.session, one_step, SEEDS[: case.requests], case.guided)
    return chunks


def _open_peer(ranks: Ranks, peer: str, folder: str, one_step: Size, plain: list[Made]) -> str | None:
    """Load it on all ranks and run one step; why it cannot be timed, or None."""
    why = not_installed(peer)
    if why is not None:
        return why
    results = ranks.call("open_peer", peer, folder, one_step, SEEDS[0])
    failures = [f"rank {rank}: {found['failed']}" for rank, found in enumerate(results) if "failed" in found]
    if failures:
        return "; ".join(failures)
    error = largest(distance(plain, [found["outputs"][0][2]]) for found in results)
    return None if error <= WRONG else f"wrong result, {error:.1e} away from plain diffusers: not timed"


def timed(act: Callable[[], list[dict[str, Any]]], timeout_s: float) -> Run:
    """Run it in a quiet moment; again (twice at most) where others computed meanwhile. The quietest run counts."""
    best: Run | None = None
    for _ in range(3):
        quiet = timeout_s > 0 and machine.wait_until_quiet(timeout_s)
        busy, before, own = machine.busy_seconds(), time.monotonic(), time.process_time()
        results = act()
        wall = time.monotonic() - before
        own_s = sum(result["cpu_s"] for result in results) + time.process_time() - own
        run = Run(
            max(result["end"] for result in results) - min(result["start"] for result in results),
            machine.share_of_others(wall, machine.busy_seconds() - busy, own_s),
            [result["cpu_s"] for result in results],
            [result["sys_s"] for result in results],
            [result["faults"] for result in results],
            [digest for _, digest, _ in sorted_outputs(results)],
            [result.get("sent_bytes", 0) for result in results],
            [latents for _, _, latents in sorted_outputs(results)],
        )
        if best is None or run.others < best.others:
            best = run
        if run.others <= machine.QUIET or not quiet:  # where it never gets quiet, another run is no better
            break
    assert best is not None
    return best


def summary(
    size: Size,
    runs: dict[str, list[Run]],
    chunks: dict[str, int],
    plain: dict[tuple[bool, int], Made],
    of: tuple[Case, ...],
) -> dict[str, Any]:
    """Medians, speedups, bounds and shares."""
    seconds = {name: median(run.seconds for run in of_name) for name, of_name in runs.items()}
    ceiling = 2 * seconds[_plain_name(True)] / seconds["two copies"]
    cases = []
    for case in of:
        plain_s = case.requests * seconds[_plain_name(case.guided)]
        best = bound(case, chunks.get(case.session, 1), size.steps)
        speedup = plain_s / seconds[case.name]
        expected = [plain[(case.guided, seed)] for seed in SEEDS[: case.requests]]
        cases.append(
            {
                "name": case.name,
                "requests": case.requests,
                "guided": case.guided,
                "chunks": chunks.get(case.session, 1),
                "seconds": seconds[case.name],
                "plain_seconds": plain_s,
                "speedup": speedup,
                "bound": best,
                "share": speedup / (best * ceiling / 2 if best > 1 else 1),
                "bitwise_equal": all(run.digests == [made.digest for made in expected] for run in runs[case.name]),
                "error": largest(distance(expected, run.latents) for run in runs[case.name]),
            }
        )
    return {
        "size": {**vars(size), "tokens": size.tokens},
        "ranks": RANKS,
        "threads_per_rank": 1,
        "rounds": len(runs["two copies"]),
        "ceiling": ceiling,
        "cases": cases,
        "most_used_by_others": max(run.others for of_name in runs.values() for run in of_name),
        "runs": {name: [_as_json(run) for run in of_name] for name, of_name in runs.items()},
    }


def sorted_outputs(results: list[dict[str, Any]]) -> list[tuple[int, str, Any]]:
    """(number of the request, digest, latents) of what all ranks returned; of copies of a run, that of the first."""
    found = {index: (index, digest, latents) for r in reversed(results) for index, digest, latents in r["outputs"]}
    return [found[index] for index in sorted(found)]


def distance(expected: list[Made], got: list[Any]) -> float:
    """The largest relative L2 distance of any request's latents."""
    pairs = [(made.latents.astype("float64"), latents) for made, latents in zip(expected, got, strict=True)]
    return largest(float(((a - b) ** 2).sum() ** 0.5 / (a**2).sum() ** 0.5) for a, b in pairs)


def largest(distances: Iterable[float]) -> float:
    """The largest of them; NaN if one is NaN, which `max` alone can hide."""
    return max(distances, key=lambda value: (math.isnan(value), value))


def bound(case: Case, chunks: int, steps: int) -> float:
    """Speedup without any cost of communication.

    One request waits for all of a step before the next one, so its pipeline fills anew in each step. Several requests
    fill each other's gaps: the pipeline fills once, as if all steps were one long chain of chunks.
    """
    from shardit.core.placement.partition import bound as of_partition

    if case.axis != "pipeline_parallel_size":
        return float(case.ranks)
    micro_batches = case.requests * (2 if case.guided else 1)
    return of_partition(micro_batches, RANKS, chunks if case.requests == 1 else chunks * steps)


def _plain_name(guided: bool) -> str:
    return f"plain, 1 x {'guidance' if guided else 'no guidance'}"


def _line(runs: dict[str, list[Run]]) -> str:
    return "; ".join(f"{name} {of_name[-1].seconds:.2f}s" for name, of_name in runs.items())


def _as_json(run: Run) -> dict[str, Any]:
    return {name: value for name, value in vars(run).items() if name not in ("digests", "latents")}
