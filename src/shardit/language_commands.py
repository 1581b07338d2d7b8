"""`shardit chat` and `shardit complete`: language models in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from shardit.engine.process.process import started_by_torchrun
from shardit.errors import InputError
from shardit.flags import ChatFlags, CompleteFlags, LanguageFlags
from shardit.settings.checks import TEXT

if TYPE_CHECKING:
    from shardit import LLM

RESET, LEAVE = "/reset", "/exit"
COMMANDS = f"{RESET} begins a new conversation, {LEAVE} or Ctrl-D ends, Ctrl-C stops an answer"
_COMMAND = re.compile(r"/[\w-]*")  # a path or a sentence is for the model


def chat(flags: ChatFlags) -> None:
    """Talk with a language model; it answers word by word."""
    with _opened(flags) as llm:
        _print_note(COMMANDS, sys.stdin.isatty())
        Conversation(llm, flags).run()


def complete(flags: CompleteFlags) -> None:
    """Continue texts; a single one is printed as it comes."""
    flags.check()
    prompts = flags.prompt or [_standard_input()]
    with _opened(flags) as llm:
        params = flags.sampling(**_recommended(llm))
        if len(prompts) == 1 and not flags.json:
            reason, count = None, 0
            for piece in llm.stream(prompts, params):
                print(piece.text, end="", flush=True)
                reason, count = piece.finish_reason, count + len(piece.token_ids)
            print()
            return _note_truncation(flags, [(reason, count)])
        outputs = llm.generate(prompts, params)
        if flags.json:
            print(json.dumps([dataclasses.asdict(one) for one in outputs], ensure_ascii=False))
        for output in () if flags.json else outputs:
            print(output.outputs[0].text)
        _note_truncation(flags, [(one.outputs[0].finish_reason, len(one.outputs[0].token_ids)) for one in outputs])
    return None


def _note_truncation(flags: CompleteFlags, ends: Sequence[tuple[str | None, int]]) -> None:
    """Say so if a text ended because the model had no room for --max-tokens. ends: reason and tokens of each text."""
    fewest = min((count for reason, count in ends if reason == "length"), default=None)
    if flags.max_tokens is not None and fewest is not None and fewest < flags.max_tokens:
        _print_note(f"note: the model had room for {fewest} of --max-tokens {flags.max_tokens}", True)


def _standard_input() -> str:
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise InputError("standard input is empty; send a text to continue, or give --prompt")
    TEXT("standard input", text)
    return text


def _opened(flags: LanguageFlags) -> LLM:
    flags.check()
    if started_by_torchrun(os.environ):
        raise InputError("chat and complete start their ranks: run them without torchrun")
    from shardit import LLM

    _print_note(f"loading {flags.model} ...", sys.stderr.isatty())
    llm = LLM(**flags.llm_arguments())
    for note in llm.notes:
        _print_note(f"note: {note}", True)
    return llm


def _recommended(llm: LLM) -> dict[str, Any]:
    """Return the sampling that the model's folder recommends."""
    standard = llm.get_default_sampling_params()
    return {
        item.name: getattr(standard, item.name) for item in dataclasses.fields(standard) if item.name != "max_tokens"
    }


def _print_note(text: str, wanted: bool) -> None:
    if wanted:
        print(text, file=sys.stderr, flush=True)


class Conversation:
    """The messages so far, and the turns that follow."""

    def __init__(self, llm: LLM, flags: ChatFlags):
        self._llm, self._params = llm, flags.sampling(**_recommended(llm))
        self._begin = [{"role": "system", "content": flags.system}] if flags.system else []
        self.messages: list[dict[str, str]] = list(self._begin)

    def run(self) -> None:
        """Answer what is typed, or each line of standard input, until it ends."""
        for text in _typed() if sys.stdin.isatty() else sys.stdin:
            text = text.strip()
            if text == LEAVE:
                return
            if text == RESET:
                self.messages = list(self._begin)
            elif _COMMAND.fullmatch(text):
                _print_note(f"there is no {text}; {COMMANDS}", True)
            elif text:
                self._turn(text)

    def _turn(self, text: str) -> None:
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        try:
            for piece in self._llm.stream(self._llm.chat_prompt(asked), self._params):
                answer += piece.text
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # the part that came counts
        except InputError as error:  # the conversation may have become too long
            if not sys.stdin.isatty():
                raise
            return _print_note(f"error: {error}; {RESET} begins a new conversation", True)
        print(flush=True)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return None


def _typed() -> Iterator[str]:
    """Lines typed at a terminal, with editing and history."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` both)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
