"""The `shardit` command: generate, and the way to the others."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Option

from shardit import commands, language_commands
from shardit.diffusion.output.from_file import differences, other_images, other_revision, read_record
from shardit.diffusion.output.output import savable
from shardit.diffusion.output.target import SUFFIXES, check_path
from shardit.engine.nodes.node_info import versions
from shardit.engine.process.exit_code import INTERRUPTED, OK, ended_by, prepare_streams
from shardit.engine.process.process import is_first_rank
from shardit.errors import InputError
from shardit.flags import ChatFlags, CompleteFlags, GenerateFlags, InspectFlags
from shardit.settings.environment import check_environment
from shardit.settings.flag_class import Once, options_of
from shardit.training.run import command as training

if TYPE_CHECKING:
    from shardit.diffusion.output.output import Output

_GIB = 1024**3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: sys.argv) and return the exit code."""
    return run_app(_app(), arguments, "shardit")


def run_script(run: Callable[[GenerateFlags], None], output: str, arguments: Sequence[str] | None = None) -> int:
    """Run a script that takes the flags of `shardit generate`; `output` is its default for --output."""
    app = _new_app()
    app.command(cls=Once)(_command(_checked(run), GenerateFlags, output=Path(output)))
    return run_app(app, arguments, Path(sys.argv[0]).name)


def generate(flags: GenerateFlags) -> None:
    """Make images, a video, sound or whatever else the pipeline makes."""
    from shardit import Omni

    if flags.filled_in and is_first_rank(os.environ):
        print("note: a tiny model, run with", ", ".join(f"{name}={value}" for name, value in flags.filled_in.items()))
    with Omni(**flags.omni_arguments()) as omni:
        check_kind(omni, flags)
        if flags.from_file is not None and is_first_rank(os.environ):
            flags.check_file(omni.takes)
            _note(other_revision(read_record(flags.from_file), omni.takes))
        report(omni.generate(flags.prompts(), flags.sampling_params()), flags.output)


def check_kind(omni: Any, flags: GenerateFlags) -> None:
    """Compare --output with what the loaded pipeline makes, before it starts to."""
    if flags.output is not None and is_first_rank(os.environ):
        kinds = omni.takes.kinds_as(flags.sampling_params().output_type)
        check_path(flags.output, kinds, transparent=omni.takes.image_mode == "RGBA")
        if flags.output.suffix.lower() in SUFFIXES["audio"] and omni.takes.sample_rate is None:
            raise InputError(f"output {flags.output}: the model does not define its sample rate; use .safetensors")


def report(outputs: Sequence[Output], path: Path | None) -> None:
    """Save outputs and print what they took: on rank 0, for the others have none."""
    for output, lost in map(savable, outputs):
        target = path or Path("output").with_suffix(SUFFIXES[output.kinds[0]][0] if output.kinds else ".png")
        written = output.save(target)
        peaks = ", ".join(f"rank {rank} {peak / _GIB:.2f} GiB" for rank, peak in enumerate(output.peak_bytes))
        left_out = [*lost, *(f"not in the file: {name}" for name in output.left_out(target))]
        _note([*output.notes, *left_out])
        print(f"seed {output.seed}; {output.seconds:.1f} s" + (f"; peak memory: {peaks}" if peaks else ""))
        for file in written:
            print(file)


def _note(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"note: {line}")


def run_app(app: typer.Typer, arguments: Sequence[str] | None, name: str) -> int:
    """Run a typer application; every way it can end becomes an exit code and at most one line on stderr."""
    prepare_streams()
    try:
        # Not standalone: typer would print usage errors in boxes and exit the process.
        code = typer.main.get_command(app).main(
            args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False
        )
        return code if isinstance(code, int) else OK  # newer typers turn Ctrl-C into 130
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED  # who pressed Ctrl-C knows
    except Exception as error:
        return ended_by(error)


def _checked(run: Callable[[GenerateFlags], None]) -> Callable[[GenerateFlags], None]:
    def checked(flags: GenerateFlags) -> None:
        flags = flags.completed()
        flags.check(writes=is_first_rank(os.environ))
        if flags.from_file is not None and is_first_rank(os.environ):
            record = read_record(flags.from_file)
            _note([*differences(record, versions()), *other_images(record, [one.size for one in flags.images])])
        run(flags)

    checked.__doc__ = run.__doc__
    return checked


def _command(run: Callable[[Any], int | None], flags: type, *, output: Path | None = None) -> Callable[..., int | None]:
    """Return a function for typer that calls `run` with an object of class `flags`; `output` is the default of
    --output."""

    def command(**values: Any) -> int | None:
        check_environment()
        return run(flags(**values))

    options = [one.replace(default=output) if output and one.name == "output" else one for one in options_of(flags)]
    command.__doc__ = run.__doc__
    command.__annotations__ = {one.name: one.annotation for one in options}
    command.__signature__ = inspect.Signature(options)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def _new_app() -> typer.Typer:
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _app() -> typer.Typer:
    app = _new_app()

    @app.callback(invoke_without_command=True)
    def about(
        context: typer.Context,
        version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False,
    ) -> None:
        """Run diffusers pipelines and language models on many devices, with the same result."""
        if version:
            from shardit import __version__

            print(f"shardit {__version__}")
            raise typer.Exit
        if context.invoked_subcommand is None:
            print(context.get_help())

    app.command("generate", cls=Once)(_command(_checked(generate), GenerateFlags))
    from shardit.server.flags import ServeFlags

    app.command("serve", cls=Once)(_command(commands.serve, ServeFlags))
    app.command("chat", cls=Once)(_command(language_commands.chat, ChatFlags))
    app.command("complete", cls=Once)(_command(language_commands.complete, CompleteFlags))
    app.command("train", cls=training.RepeatedFlags)(_command(training.train, training.TrainFlags))
    app.command("inspect", cls=Once)(_command(commands.inspect, InspectFlags))
    app.command("tiny", cls=Once)(commands.tiny)
    return app


if __name__ == "__main__":
    sys.exit(main())
