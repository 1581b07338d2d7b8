"""Every code block of README.md and docs/ runs: Python as it is, commands up to the start of their ranks.

Clients of a server, Python with OpenAI's library and curl, run in test_serving_docs.py; the way from clips to a LoRA
runs in test_training_docs.py.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

from shardit import cli, parallel_state
from shardit.language.loading.source import decoder_source
from shardit.models import tiny
from tests.language.adapters import write_adapter
from tests.support.code_blocks import Block, blocks
from tests.support.fork_servers import kept_fork_server
from tests.support.http_fake import picture
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks

NOT_RUN = {
    ("README.md", "pip install torch==2.13.0"): "changes the environment; test_packages.py has a full test of it",
    ("README.md", "pip install -e ."): "changes the environment; test_packages.py has a full test of it",
    ("README.md", "pip install openai"): "changes the environment",
    ("README.md", "pip install peft"): "changes the environment",
    ("docs/serving.md", "ray start --head"): "needs Ray",
    ("docs/serving.md", "ray start --address=node-a:6379"): "needs Ray and a second machine",
}
"""Commands that cannot run in a test, with the reason."""

TEXT = {
    "docs/api.md": "signatures; test_api_page.py compares them",
    "docs/how-it-works.md": "an annotated forward, a diagram",
    "docs/training.md": "a folder, the lines of a run; test_training_docs.py compares them",
}
"""Pages with blocks of plain text, and their contents."""

MODELS = {
    "MODEL": "tiny/wan2.2-t2v",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "tiny/wan2.2-ti2v",
}
"""Models of the pages that tests do not have, and the ones that they use instead."""

ADAPTERS = ("my-adapter", "another-adapter")
"""Adapters of language models that pages use."""

STARTS = (
    "engine.start.StartedRanks",
    "engine.rank.worker.open_session",
    "server.entry.serve.serve",
    "server.entry.torchrun_agent.Agent",
    "training.run.launch.LocalRun",
)
"""What starts ranks, or makes this process one."""


class RanksWouldStart(BaseException):
    """Raised in place of starting ranks; no `except Exception` catches it."""


def would_start(*_: Any, **__: Any) -> NoReturn:
    raise RanksWouldStart


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the files that pages read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHARDIT_PROGRESS", "0")
    Path("cat.png").write_bytes(picture())
    for block in blocks():
        if block.language == "toml":
            Path(block.text.splitlines()[0].removeprefix("# ")).write_text(block.text, "utf-8")
    Path("rows.jsonl").write_text('{"text": "Once upon a time"}\n', "utf-8")
    Path("my_clips").mkdir()
    Path("my_clips", "a.mp4").touch()
    Path("my_clips", "a.txt").write_text("a cat", "utf-8")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_every_block_is_of_a_known_kind() -> None:
    for block in blocks():
        place = f"{block.page}:{block.line}"
        assert block.language in ("python", "sh", "text", "toml"), f"{place}: tag the block python, sh, toml or text"
        assert block.language != "text" or block.page in TEXT, f"{place}: text that no test compares"
        for command in block.commands if block.language == "sh" else ():
            known = command.split()[0] in (*RUN, "curl")
            assert known or (block.page, command) in NOT_RUN, f"{place}: no test runs {command}"


def test_exceptions_exist() -> None:
    found = {(block.page, command) for block in blocks() if block.language == "sh" for command in block.commands}
    assert set(NOT_RUN) <= found
    assert set(TEXT) == {block.page for block in blocks() if block.language == "text"}
    words = {word for _, command in found for word in shlex.split(command)}
    assert set(MODELS) <= words


def python(kind: str) -> list[Block]:
    """The Python blocks whose ranks are processes of an `Omni` or `LLM`, or are started by torchrun."""
    elsewhere = ("OpenAI(", 'load_lora_weights("my_lora")')
    of_python = [
        one for one in blocks() if one.language == "python" and not any(text in one.text for text in elsewhere)
    ]
    starts = [any(f"{name}(" in block.text for name in ("Omni", "LLM")) for block in of_python]
    return [block for block, starting in zip(of_python, starts, strict=True) if starting == (kind == "omni")]


def test_programs_with_omni(folder: Path) -> None:
    given = {path.name for path in folder.glob("*.*")}
    for name in ADAPTERS:
        write_adapter(folder / name, decoder_source("tiny/llama").folder, target_modules=["q_proj"])
    with kept_fork_server():
        for block in python("omni"):
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "__main__"})
    written = {path.name for path in folder.glob("*.*")} - given
    assert written == {"mountains.mp4", "seed-1.png", "seed-2.png", "dog.png"}


def run_pages(rank: int, count: int, method: str, scripts: list[Block], port: int, folder: str) -> int:
    """Run blocks in the environment that torchrun sets. The blocks of a page share their names."""
    os.chdir(folder)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    names: dict[str, dict[str, Any]] = {}
    for block in scripts:
        exec(
            compile(block.text, f"{block.page}:{block.line}", "exec"),
            names.setdefault(block.page, {"__name__": "__main__"}),
        )
        parallel_state.destroy_model_parallel()
    return len(scripts)


def test_programs_under_torchrun(tmp_path: Path) -> None:
    for name in ("wan2.2-t2v", "flux"):
        tiny.resolve(f"tiny/{name}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    scripts = python("torchrun")
    assert run_ranks(2, run_pages, scripts, port, str(tmp_path)) == [len(scripts)] * 2


def shardit(words: list[str]) -> None:
    starts = words[0] in ("generate", "serve", "chat", "complete", "train") and "--help" not in words
    if words[0] != "tiny":
        words = [MODELS.get(word, word) for word in words]
    try:
        assert cli.main(words) == 0
    except RanksWouldStart:
        assert starts
    else:
        assert not starts


def torchrun(words: list[str]) -> None:
    args = get_args_parser().parse_args(words)
    if not args.module:
        assert args.training_script == "my_script.py"  # a Python block of the page
        return
    assert args.training_script == "shardit"
    per_node, rank = int(args.nproc_per_node), int(args.node_rank) * int(args.nproc_per_node)
    ranks = {
        "RANK": rank,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": int(args.nnodes.partition(":")[0]) * per_node,
        "LOCAL_WORLD_SIZE": per_node,
    }
    run = {"GROUP_RANK": args.node_rank, "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_RUN_ID": "run"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ranks, **run, "MASTER_ADDR": args.master_addr, "MASTER_PORT": args.master_port}.items():
            patch.setenv(name, str(value))
        shardit(args.training_script_args)


def script(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(RanksWouldStart):
            runpy.run_path(words[0], run_name="__main__")


def make(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


RUN: dict[str, Callable[[list[str]], None]] = {"shardit": shardit, "torchrun": torchrun, "python": script, "make": make}
COMMANDS = [
    (block.page, command)
    for block in blocks()
    if block.language == "sh"
    for command in block.commands
    if command.split()[0] in RUN
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands(page: str, command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STARTS:
        monkeypatch.setattr(f"shardit.{name}", would_start)
    if "inspect my-folder" in command:
        tiny.write("wan2.2-t2v", folder / "my-folder")
    if "--lora my-lora" in command:  # that the command before makes
        (folder / "my-lora").mkdir()
        weights = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1, 1)}
        save_file(weights, folder / "my-lora" / "pytorch_lora_weights.safetensors")
    if "--lora my-adapter" in command:
        write_adapter(folder / "my-adapter", decoder_source("tiny/llama").folder, target_modules=["q_proj"])
    program, *words = shlex.split(command)
    RUN[program](words)
