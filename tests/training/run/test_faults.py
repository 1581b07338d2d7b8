"""Runs that go wrong: a dead rank, unreadable data on one rank, a loss that is no number, a full disk, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shardit import InputError, RankError
from shardit.training.run.checkpoint import find
from tests.support.paths import ROOT
from tests.training.run.runs import rows, run, same, weights

pytestmark = pytest.mark.usefixtures("one_fork_server")


TWO: dict[str, Any] = {"pipeline_parallel_size": 2, "timeout_s": 60.0, "steps": 6}
REPLICAS: dict[str, Any] = {"data_parallel_size": 2, "timeout_s": 60.0, "steps": 6}


def ended(output: Path, error: type[Exception], **given: Any) -> str:
    """The error of a run, and that it came soon."""
    begin = time.monotonic()
    with pytest.raises(error) as found:
        run(output, **given)
    assert time.monotonic() - begin < 20  # of it most for the start
    return str(found.value).splitlines()[0]


@pytest.mark.parametrize("given", [TWO, REPLICAS])
def test_a_dead_rank_ends_all(given: dict[str, Any], tmp_path: Path) -> None:
    text = ended(tmp_path / "run", RankError, model="toy kill:1:3", **given)
    assert time.time() - (tmp_path / "run" / "metrics.jsonl").stat().st_mtime < 10  # after the last step
    assert text.startswith("rank 1 failed: killed by signal 9")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("given", [TWO, REPLICAS])
def test_data_that_one_rank_cannot_read_is_one_error(given: dict[str, Any], tmp_path: Path) -> None:
    text = ended(tmp_path / "run", InputError, model="toy refuse:1:3", **given)
    assert text == "step 3: text-3.txt is no text: repair it"
    text = ended(tmp_path / "other", RankError, model="toy raise:1:3", **given)
    assert "step 3: OSError: text-4.txt: the disk is gone" in text
    assert "rank 1" in text


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be made: Not a directory" in ended(tmp_path / "file" / "run", InputError)


def test_a_warm_up_that_is_longer_than_the_epochs(tmp_path: Path) -> None:
    text = ended(tmp_path / "run", InputError, epochs=1, warmup_steps=50)
    assert text == "warmup_steps=50 is more than steps=6 (1 epoch): give fewer, or more epochs"


def test_unreadable_data_before_the_first_step(tmp_path: Path) -> None:
    assert "text-3.txt is no text" in ended(tmp_path / "run", InputError, model="toy refuse:1:1", **TWO)


@pytest.mark.parametrize("given", [{}, TWO, REPLICAS])
def test_a_loss_that_is_no_number_stops_the_run(given: dict[str, Any], tmp_path: Path) -> None:
    shared = {"save_every": 2, "steps": 6, "data": "toy:3", **given}
    text = ended(tmp_path / "run", InputError, model="toy nan:4", **shared)
    assert text.startswith("step 4: the loss is nan, with the data text-")
    assert "learning_rate" in text
    assert [one.step for one in find(tmp_path / "run")] == [2]
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(output, steps=2, save_every=2)
    good = {file.name: file.read_bytes() for file in find(output)[0].folder.iterdir()}
    command = [sys.executable, "-m", "tests.training.run.small_disk", str(output)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    notes = [line for line in done.stdout.splitlines() if "no checkpoint of step" in line]
    assert len(notes) == 2, done  # of steps 4 and 5
    assert "(File too large)" in notes[0]
    assert "the last one is of step 2" in notes[0]
    error = done.stderr.strip().splitlines()[-1]
    assert "cannot be written" in error
    assert "the checkpoint of step 2 is complete" in error
    assert {file.name: file.read_bytes() for file in find(output)[0].folder.iterdir()} == good
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 5]
    assert not list((output / "checkpoints").glob(".partial-*"))


class Interrupter(threading.Thread):
    """Sends signals to this process once a run has done some steps."""

    def __init__(self, output: Path, steps: int, number: int):
        super().__init__(daemon=True)
        self.output, self.steps, self.number = output, steps, number

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if (self.output / "metrics.jsonl").read_text().count("\n") >= self.steps:
                    os.kill(os.getpid(), self.number)
                    return
            time.sleep(0.02)


@pytest.mark.parametrize(("given", "number"), [(TWO, signal.SIGINT), (REPLICAS, signal.SIGTERM)])
def test_a_signal_ends_a_run_with_a_checkpoint(
    given: dict[str, Any], number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, given = tmp_path / "run", {**given, "steps": 40}
    interrupter = Interrupter(output, 3, number)
    interrupter.start()
    assert run(output, model="toy slow:0.1", **given)
    interrupter.join()
    assert "stopping after the present step, with a checkpoint" in capfd.readouterr().err
    (checkpoint,) = find(output)
    assert 3 <= checkpoint.step < 40
    assert len(rows(output)) == checkpoint.step
    assert not weights_are_there(output)


def weights_are_there(output: Path) -> bool:
    return any(output.glob("*/model.safetensors"))


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    output, given = tmp_path / "run", {"steps": 12, "model": "toy slow:0.1"}
    interrupter = Interrupter(output, 2, signal.SIGINT)
    interrupter.start()
    assert run(output, **given)
    interrupter.join()
    assert not run(output, resume=True, **given)
    run(tmp_path / "whole", **given)
    assert same(weights(output), weights(tmp_path / "whole"))
    assert rows(output) == rows(tmp_path / "whole")


def test_ctrl_c_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", model="toy slow:30", **TWO)
    timer.join()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(output, steps=2)
    folder = find(output)[0].folder
    whole = (folder / "stage-0.pt").read_bytes()
    (folder / "stage-0.pt").write_bytes(whole[: len(whole) // 2])
    assert "stage-0.pt is damaged: delete" in ended(output, InputError, steps=3, resume=True)
    (folder / "stage-0.pt").write_bytes(whole)
    for record in ("{", '{"step": 2}'):
        (folder / "run.json").write_text(record)
        assert "is damaged" in ended(output, InputError, steps=3, resume=True)
    (folder / "run.json").unlink()  # as of a checkpoint that is being removed
    run(output, steps=3, resume=True)
    assert [row["step"] for row in rows(output)] == [1, 2, 3]
    assert [one.name for one in (output / "checkpoints").iterdir()] == ["step-00000003"]
