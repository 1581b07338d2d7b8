"""The way from a folder of clips to a LoRA in docs/training.md, as it is written there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from shardit import cli
from tests.support.code_blocks import blocks
from tests.training.data.files import clip


def shown(said: str) -> list[str]:
    """Lines of a run, without times."""
    return [re.sub(r"in [0-9.]+ s", "in S s", line) for line in said.splitlines()]


def test_from_a_folder_of_clips_to_a_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    of_page = [block for block in blocks() if block.page == "docs/training.md"]
    start = next(number for number, block in enumerate(of_page) if block.language == "text")
    listing, command, lines, program = of_page[start : start + 4]
    monkeypatch.chdir(tmp_path)
    for line in listing.text.splitlines():
        path, _, caption = line.partition(" ")
        Path(path).parent.mkdir(exist_ok=True)
        if caption:
            Path(path).write_text(caption.strip())
        else:
            clip(Path(path), 9, size=(96, 64))
    (words,) = map(shlex.split, command.commands)
    assert cli.main(words[1:]) == 0
    assert shown(capfd.readouterr().out) == shown(lines.text)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(program.text, "docs/training.md", "exec"), names)
    assert names["clip"].shape == (9, 64, 96, 3)
    assert names["pipe"].get_active_adapters()
