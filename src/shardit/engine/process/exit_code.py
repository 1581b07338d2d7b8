"""The exit codes of the commands, and the line with the reason of a failure."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from typing import Any

from shardit.engine.process.process import is_first_rank
from shardit.errors import InputError, RankError, is_interrupt, likeliest
from shardit.loading.missing_packages import missing_package
from shardit.settings.environment import DEBUG, switch

OK, OURS, USERS, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done, our failure (a rank died), the user's mistake, Ctrl-C."""

OTHER_RANKS_DELAY_S = 3.0
"""Under torchrun the first rank that ends with an error has all others ended; its reason must be printed."""


def ended_by(error: Exception) -> int:
    """Print at most one line on stderr for an error that has ended a command, and return the exit code."""
    if is_interrupt(error):
        return INTERRUPTED
    with contextlib.suppress(InputError):  # of a wrong value, which commands report before they do anything
        if switch(DEBUG, os.environ, default=False):
            traceback.print_exception(error)
    # Usage errors: typer has its own copy of click's classes, or click's, depending on its version.
    if hasattr(error, "format_message"):
        return _failed(_usage(error), USERS)
    if isinstance(error, InputError):
        return _failed(str(error), USERS)
    if isinstance(error, ImportError) and not str(error.name).startswith("shardit"):
        return _failed(str(missing_package(error)), USERS)
    return _failed(_in_one_line(error), OURS, every_rank=True)


def prepare_streams() -> None:
    """Let standard streams be open, and pass any bytes, before the first is used."""
    _open_closed_streams()
    _take_any_bytes()


def _open_closed_streams() -> None:
    """Connect the standard streams that a shell has closed (`<&-`) to nothing: Python has None for them, and the next
    file would get their descriptor."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115  for the whole process
            os.set_inheritable(stream.fileno(), True)  # ranks would begin without it
            setattr(sys, name, stream)


def _take_any_bytes() -> None:
    """Let standard input and output pass bytes that are no valid text: a check reports the mistake in them, and names
    of files may have any."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            with contextlib.suppress(io.UnsupportedOperation):  # somebody has already read from it
                stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _usage(error: Any) -> str:
    """Return the message of a usage error; for an unknown flag it shows how the command takes the value, or names the
    commands that have the flag; of an unknown command it lists the commands."""
    text = error.format_message()
    command = getattr(error.ctx, "command", None)
    commands = getattr(command, "commands", ())
    if commands and text.startswith("No such command"):
        return f"{text} Commands: {', '.join(commands)}."
    if text.startswith("Got unexpected extra argument"):
        given, flags = error.ctx.params, _flags_of(command)
        missing = [one for one in ("model", "prompt") if f"--{one}" in flags and not given.get(one)]
        return f"{text}; the {missing[0]} is given as --{missing[0]}" if missing else text
    flag = str(getattr(error, "option_name", ""))
    name = flag.lstrip("-").replace("-", "_")
    unknown = text.startswith("No such option") and name.isidentifier()
    return f"No such option: {flag}{_instead(flag, name, error.ctx)}" if unknown else text


def _instead(flag: str, name: str, context: Any) -> str:
    """Return what to give in place of an unknown flag. name: as a parameter."""
    command, every = context.command, getattr(getattr(context.parent, "command", None), "commands", {})
    if any(one.name == name and one.param_type_name == "argument" for one in command.params):
        return f"; give it without the flag: {context.command_path} {name.upper()}"
    likely = likeliest(name, [one.lstrip("-").replace("-", "_") for one in _flags_of(command)]) or ""
    others = [other for other, one in every.items() if flag in _flags_of(one)]
    text = f"; it is an option of {', '.join(others)}" if others else ""
    if likely and (not others or likely.endswith(f"_{name}")):
        text = f" (did you mean --{likely.replace('_', '-')}?)"
    further = f"; if {name} is an argument of the pipeline, give it as --extra {name}=VALUE"
    return f"{text}{further}" if "--extra" in _flags_of(command) else text


def _flags_of(command: Any) -> list[str]:
    return [flag for one in getattr(command, "params", ()) for flag in one.opts]


def _failed(text: str, code: int, every_rank: bool = False) -> int:
    # Under torchrun every rank finds the same mistake; only what can differ is worth printing from each.
    if every_rank or is_first_rank(os.environ):
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
    else:
        time.sleep(OTHER_RANKS_DELAY_S)
    return code


def _in_one_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = lines[0] if isinstance(error, RankError) else f"{type(error).__name__}: {lines[0]}"
    return named if len(lines) == 1 else f"{named} (SHARDIT_DEBUG=1 shows all of it)"
