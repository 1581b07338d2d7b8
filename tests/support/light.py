"""Command lines of shardit in processes that have imported nothing heavy, each forked from one that waits: a process
of its own for each takes half a second."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_WAITING = """
import json, os, sys
from shardit.cli import main

def point(number, path):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(fd, number)
    os.close(fd)

answers = os.dup(1)
for number in (1, 2):
    point(number, os.devnull)
# What these read of diffusers' source all others know.
for words in (["generate", "--prompt=a", "--model=tiny/flux"], ["serve", "tiny/flux"]):
    main([*words, "--scheduler=Nope"])

def run(task):
    os.close(answers)
    sys.modules.update(dict.fromkeys(task["lacks"]))
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(task["env"])
    point(1, task["out"])
    point(2, task["err"])
    code = 70
    try:
        code = main(task["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(99 if "torch" in sys.modules else code)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run(json.loads(line))
    os.write(answers, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


class LightCommands:
    """Runs command lines; those that have imported torch exit with 99."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def run(
        self, words: Sequence[str], cwd: Path, env: Mapping[str, str] = os.environ, lacks: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run one in a folder and an environment, as if the packages `lacks` were not installed."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            task = {"words": list(words), "cwd": str(cwd), "env": dict(env), "lacks": list(lacks)}
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps({**task, "out": str(out), "err": str(err)}) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(list(words), code, out.read_text(), err.read_text())


@contextlib.contextmanager
def light_commands(*path: Path) -> Iterator[LightCommands]:
    """With folders in front of the Python path."""
    parts = [str(part) for part in path] + [part for part in [os.environ.get("PYTHONPATH")] if part]
    with subprocess.Popen(
        [sys.executable, "-c", _WAITING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(parts)},
    ) as process:
        yield LightCommands(process)
        assert process.stdin is not None
        process.stdin.close()
