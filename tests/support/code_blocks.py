"""The fenced code blocks of README.md and docs/."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.support.paths import DOCS, ROOT


@dataclass(frozen=True)
class Block:
    """A block of a page: its language tag ("" if it has none), its text, and the line of its fence."""

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Commands of a shell block, without comments and with continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def blocks() -> list[Block]:
    """All blocks of all pages, in order."""
    found = []
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        page, text = str(path.relative_to(ROOT)), path.read_text("utf-8")
        fences = list(re.finditer(r"^( *)```(.*)$", text, re.MULTILINE))
        assert len(fences) % 2 == 0, f"{page}: a block is not closed"
        for begin, end in zip(fences[::2], fences[1::2], strict=True):
            inside = text[begin.end() + 1 : end.start()]
            line = text.count("\n", 0, begin.start()) + 1
            found.append(Block(page, line, begin[2].strip(), inside))
    return found


def commands(program: str) -> list[str]:
    """All commands of all pages that start a program."""
    return [
        command
        for block in blocks()
        if block.language == "sh"
        for command in block.commands
        if command.split()[0] == program
    ]
