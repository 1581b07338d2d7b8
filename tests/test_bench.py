"""The bench at tiny size: it runs, its last line is the JSON document, and what it compares is bit-equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import peers, report
from bench import speed as speed_bench

ROOT = Path(__file__).parent.parent
CASE_KEYS = {"name", "requests", "guided", "chunks", "seconds", "plain_seconds", "speedup", "bound", "share"}


@pytest.mark.full
@pytest.mark.timeout(120)
def test_quick_bench(tmp_path: Path) -> None:
    only = [word for name in ("speed", "axes", "overhead", "host", "memory", "schedules") for word in ("--only", name)]
    target = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--quick", *only, "--output", str(target)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document == json.loads(target.read_text())
    assert {"cpu", "cores", "versions", "commit", "date", "command", "load_before", "load_after"} <= set(
        document["machine"]
    )
    speed = document["speed"]
    assert speed["ceiling"] > 0
    assert len(speed["cases"]) == 8
    for case in speed["cases"]:
        assert set(case) >= CASE_KEYS
        assert case["bitwise_equal"], case["name"]
    for case in document["axes"]["cases"]:
        assert case["error"] <= 1e-5, case["name"]
    axes = document["axes"]
    assert {case["name"] for case in axes["cases"]} | set(axes["skipped"]) == {case.name for case in speed_bench.AXES}
    assert set(axes["skipped"]) == {name for name in peers.PEERS if peers.not_installed(name)}
    for line in axes["skipped"].items():
        assert "  {}: {}\n".format(*line) in done.stdout
    assert {"plain_cpu_s_per_step", "session_cpu_s_per_step", "extra_percent"} <= set(document["overhead"])
    assert all(document["host"][key] > 0 for key in ("plain_block_us", "own_block_us", "hop_us", "sum_us"))
    assert [rank["read_over_owned"] <= 1.02 for rank in document["memory"]["ranks"]] == [True, True]
    assert {row["ranks"] for row in document["schedules"]} == set(range(1, 9))
    for row in document["schedules"]:
        assert row["speedup"] <= row["formula"] + 1e-9, row


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let these modules, and no others, be missing."""
    monkeypatch.setattr(peers, "missing", lambda asked: [name for name in asked if name in modules])


def test_a_peer_that_is_not_installed_is_skipped_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "xfuser")
    line = "xfuser is not installed: python -m pip install --no-deps xfuser yunchang einops"
    no_ranks: Any = None  # nothing is asked of them
    assert speed_bench._open_peer(no_ranks, "xDiT, Ring", "", None, []) == line  # type: ignore[arg-type]
    size = {"blocks": 1, "heads": 1, "head_dim": 1, "tokens": 1, "steps": 1}
    found = {"size": size, "ranks": 2, "rounds": 1, "ceiling": 2.0, "cases": [], "skipped": {"xDiT, Ring": line}}
    assert report._speed(found)[-1] == f"  xDiT, Ring: {line}"


@pytest.mark.parametrize(
    ("distances", "why"),
    [
        ((0.0, 5e-5), None),
        ((0.0, 9e-4), "wrong result, 9.0e-04 away from plain diffusers: not timed"),
        ((0.0, float("nan")), "wrong result, nan away from plain diffusers: not timed"),
        ((None, 0.0), "rank 0: TypeError: no"),
    ],
)
def test_a_peer_is_compared_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, distances: tuple[float | None, ...], why: str | None
) -> None:
    without(monkeypatch)
    plain = np.ones(4)

    class Fake:
        def call(self, *_: Any) -> list[dict[str, Any]]:
            return [
                {"failed": "TypeError: no"} if far is None else {"outputs": [(0, "digest", plain * (1 + far))]}
                for far in distances
            ]

    made = [speed_bench.Made("digest", plain)]
    assert speed_bench._open_peer(Fake(), "xDiT, Ring", "", None, made) == why  # type: ignore[arg-type]


def quick(name: str, target: Path, timeout: float) -> tuple[dict[str, Any], str]:
    """Run one part of the bench at tiny size; return what it has measured, and what it prints."""
    command = [sys.executable, "-m", "bench", "--quick", "--only", name, "--output", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text())[name], done.stdout


@pytest.mark.full
@pytest.mark.timeout(300)
def test_quick_bench_of_training(tmp_path: Path) -> None:
    found, printed = quick("training", tmp_path / "result.json", 280)
    for task in found.values():
        assert {"one rank", "two copies", "1f1b", "2 replicas", "2 tensor ranks"} <= {
            case["name"] for case in task["cases"]
        }
        losses = [case["loss"] for case in task["cases"] if case["loss"] is not None]
        assert max(losses) - min(losses) < 1e-5 * max(losses)
        for case in task["cases"]:
            assert 0 < case.get("share", 1) < 2
            assert ("peak_bytes" in case) == (case["name"] != "two copies")
    assert "torch's 1f1b, cut by hand" in printed


@pytest.mark.full
@pytest.mark.timeout(400)
def test_quick_bench_of_the_server(tmp_path: Path) -> None:
    found, printed = quick("serve", tmp_path / "result.json", 380)
    assert len(found["throughput_turns"]) == found["turns"] == 7
    assert 0 < found["throughput_share"] < 2
    assert found["cancel_most_steps"] <= 1
    assert found["restart_beyond_start_s"] < 3
    assert found["api_rss_mib"] < 150
    assert found["health_requests"] > 10
    assert "ranks' time while HTTP is flooded" in printed


@pytest.mark.full
@pytest.mark.timeout(300)
def test_quick_bench_of_texts(tmp_path: Path) -> None:
    found, printed = quick("serve-texts", tmp_path / "result.json", 280)
    assert [one["clients"] for one in found["clients"]] == [1, 4, 16]
    for one in found["clients"]:
        assert 0 < one["share_of_generate"]["streamed"] < 2
        assert 0 < one["token_s"]["p50"] <= one["token_s"]["p99"] < one["request_s"]["p99"]
    chunks, whole = (found["long_prompt"][name] for name in ("chunks", "whole"))
    assert 0 < chunks["usual_step_s"] <= chunks["longest_step_s"] < whole["first_token_s"] + 1
    assert 0 < chunks["last_chunk_s"] < whole["first_token_s"] + 1
    assert "A long prompt beside eight texts" in printed


@pytest.mark.full
@pytest.mark.timeout(120)
def test_measurement_of_a_gpu_on_a_cpu() -> None:
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--small", "--runs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        found = json.loads(line[line.index("{") :])
        assert found["equal"]
        assert found["compiled_distance"] < 0.02
    assert len(done.stdout.splitlines()) == 3


def test_measurement_of_a_gpu_without_one() -> None:
    command = [sys.executable, "-m", "bench.gpu"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=110)
    assert (done.returncode, done.stdout) == (0, "no GPU: nothing to test or to measure here\n")
