"""The `shardit` command: generate, serve, inspect, tiny."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from shardit.diffusion.output.from_file import differences, other_pictures, other_revision, read_record
from shardit.diffusion.output.output import SUFFIXES, check_path, savable
from shardit.engine.nodes.node_facts import versions
from shardit.errors import InputError
from shardit.flags import GenerateFlags, InspectFlags, options_of
from shardit.loading.dtypes import setting
from shardit.logs import FORMAT_VARIABLE

if TYPE_CHECKING:
    from shardit.diffusion.output.output import Output
    from shardit.server.flags import ServeFlags

OK, OURS, USERS, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done, our failure (a rank died), the user's mistake, Ctrl-C."""

RANK_0_FIRST_S = 3.0
"""Under torchrun the first rank that ends with an error has all others ended; it is to be the one that says why."""

_GIB = 1024**3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: sys.argv) and return the exit code."""
    return run_app(_app(), arguments, "shardit")


def run_script(run: Callable[[GenerateFlags], None], output: str, arguments: Sequence[str] | None = None) -> int:
    """Run a script that takes the flags of `shardit generate`; `output` is its default for --output."""
    app = _new_app()
    app.command()(_command(_checked(run), GenerateFlags, output=Path(output)))
    return run_app(app, arguments, Path(sys.argv[0]).name)


def generate(flags: GenerateFlags) -> None:
    """Make pictures, a video, sound or whatever else the pipeline makes."""
    from shardit import Omni

    if flags.filled_in and _is_first_rank():
        print("note: a tiny model, run with", ", ".join(f"{name}={value}" for name, value in flags.filled_in.items()))
    with Omni(**flags.omni_arguments()) as omni:
        check_kind(omni, flags)
        if flags.from_file is not None and _is_first_rank():
            flags.check_file(omni.takes)
            _note(other_revision(read_record(flags.from_file), omni.takes.made_by))
        report(omni.generate(flags.prompts(), flags.sampling_params()), flags.output)


def check_kind(omni: Any, flags: GenerateFlags) -> None:
    """Compare --output with what the loaded pipeline makes, before it starts to."""
    if flags.output is not None and _is_first_rank():
        kinds = omni.takes.kinds_as(flags.sampling_params().output_type)
        check_path(flags.output, kinds, transparent=omni.takes.image_mode == "RGBA")
        if flags.output.suffix.lower() in SUFFIXES["audio"] and omni.takes.sample_rate is None:
            raise InputError(f"output {flags.output}: the model does not tell its sample rate; use .safetensors")


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


def serve(flags: ServeFlags) -> int:
    """Serve a model over HTTP: OpenAI's interface, jobs that survive crashes, and a page."""
    from shardit.diffusion.preflight import preflight
    from shardit.diffusion.preflight.static_signature import static_signatures_of_model
    from shardit.engine.process.process import started_by_torchrun
    from shardit.server.unservable import unservable

    options = flags.options()
    os.environ[FORMAT_VARIABLE] = flags.log_format.value  # all processes of the server inherit it
    local = options.executor == "local"
    preflight.check(
        options.model,
        options.config,
        options.loading,
        dtype=options.dtype,
        attention_backend=options.attention_backend,
        files=local,
        packages=local,
    )
    takes, _ = static_signatures_of_model(options.model)
    if takes is not None and (problem := unservable(takes)):
        raise InputError(problem)
    if started_by_torchrun(os.environ):
        from shardit.server.entry.torchrun_agent import serve_as_rank

        return serve_as_rank(options)
    from shardit.server.entry.serve import serve as run

    return run(options)


def inspect(flags: InspectFlags) -> None:
    """Show what each rank would hold; reads no weights."""
    config, dtype = flags.parallel_config(), setting(flags.dtype, "--dtype")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it tells of every optional package that it misses
    from shardit.diffusion.loading.model_options import model_options
    from shardit.diffusion.loading.shipped import configurations
    from shardit.diffusion.preflight import preflight

    options, configs = model_options(variant=flags.variant), configurations(flags.what(), flags.variant)
    if configs is None:
        preflight.check(flags.what(), config, options, dtype=dtype, packages=False)
    else:
        preflight.check(configs, config, model_options(), dtype=dtype, files=False, packages=False)
    from shardit.engine.inspect import inspect_model

    document = inspect_model(flags.what(), config, dtype=dtype, variant=flags.variant)
    if _is_first_rank():
        print(json.dumps(document) if flags.as_json else table(document))


def table(document: dict[str, Any]) -> str:
    """The document of `shardit inspect --json` for people."""
    rows = [("rank", "component", "blocks", "parameters", "MiB")]
    for rank in document["ranks"]:
        for name, part in rank["components"].items():
            size = f"{part['bytes'] / 1024**2:,.1f}"
            rows.append((str(rank["rank"]), name, _spans(part["blocks"]), f"{part['parameters']:,}", size))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            cell.rjust(width) if column in (0, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    totals = [sum(part["bytes"] for part in rank["components"].values()) / 1024**2 for rank in document["ranks"]]
    whole = document["bytes"] / 1024**2
    fullest = f"fullest rank: {max(totals):,.1f} MiB, {max(totals) / whole:.1%} of the {whole:,.1f} MiB of the model"
    return "\n".join([*lines, "", fullest, f"chunks per rank: {document['chunks']}", *map(str, document["notes"])])


def _spans(blocks: Any) -> str:
    """Block numbers with neighbours joined: 0-3, 8-11; a count as it is."""
    if not isinstance(blocks, (list, tuple)) or not all(isinstance(block, int) for block in blocks):
        return ", ".join(map(str, blocks)) if isinstance(blocks, (list, tuple)) else str(blocks or "-")
    spans: list[list[int]] = []
    for block in sorted(blocks):
        if spans and block == spans[-1][1] + 1:
            spans[-1][1] = block
        else:
            spans.append([block, block])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in spans) or "-"


def tiny(
    name: Annotated[str, Argument(help="Name of the tiny model, such as wan2.2-t2v.")],
    folder: Annotated[Path, Argument(metavar="DIR", help="Folder to write, new or empty.")],
) -> None:
    """Write a tiny checkpoint, a complete diffusers folder to try things on."""
    from shardit.models import tiny as checkpoints

    written = checkpoints.write(name, folder)
    if _is_first_rank():
        print(written or folder)


def run_app(app: typer.Typer, arguments: Sequence[str] | None, name: str) -> int:
    """Run a typer application; every way it can end becomes an exit code and at most one line on stderr."""
    try:
        # Not standalone: typer would print usage errors in boxes and end the process by itself.
        code = typer.main.get_command(app).main(
            args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False
        )
        return code if isinstance(code, int) else OK  # newer typers turn Ctrl-C into 130
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED  # who pressed Ctrl-C knows
    except Exception as error:
        if os.environ.get("SHARDIT_DEBUG") == "1":
            traceback.print_exc()
        # Usage errors: typer has its own copy of click's classes, or click's, depending on its version.
        if hasattr(error, "format_message"):
            return _failed(error.format_message(), USERS)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(error, InputError):
            return _failed(str(error), USERS)
        return _failed(_in_one_line(error), OURS, every_rank=True)


def _failed(text: str, code: int, every_rank: bool = False) -> int:
    # Under torchrun every rank finds the same mistake; only what can differ is worth printing from each.
    if every_rank or _is_first_rank():
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
    else:
        time.sleep(RANK_0_FIRST_S)
    return code


def _in_one_line(error: Exception) -> str:
    from shardit.errors import RankError

    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = lines[0] if isinstance(error, RankError) else f"{type(error).__name__}: {lines[0]}"
    return named if len(lines) == 1 else f"{named} (SHARDIT_DEBUG=1 shows all of it)"


def _is_first_rank() -> bool:
    # RANK alone may be left over from something else; torchrun sets both.
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def _checked(run: Callable[[GenerateFlags], None]) -> Callable[[GenerateFlags], None]:
    def checked(flags: GenerateFlags) -> None:
        flags = flags.completed()
        flags.check(writes=_is_first_rank())
        if flags.from_file is not None and _is_first_rank():
            record = read_record(flags.from_file)
            _note([*differences(record, versions()), *other_pictures(record, [one.size for one in flags.pictures])])
        run(flags)

    checked.__doc__ = run.__doc__
    return checked


def _command(run: Callable[[Any], int | None], flags: type, *, output: Path | None = None) -> Callable[..., int | None]:
    """A function for typer that calls `run` with an object of class `flags`; `output` is the default of --output."""

    def command(**values: Any) -> int | None:
        return run(flags(**values))

    command.__doc__ = run.__doc__
    command.__annotations__, signature = options_of(flags, output=output)
    command.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
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
        """Run diffusers pipelines on many devices, with the same result."""
        if version:
            from shardit import __version__

            print(f"shardit {__version__}")
            raise typer.Exit
        if context.invoked_subcommand is None:
            print(context.get_help())

    app.command("generate")(_command(_checked(generate), GenerateFlags))
    from shardit.server.flags import ServeFlags

    app.command("serve")(_command(serve, ServeFlags))
    app.command("inspect")(_command(inspect, InspectFlags))
    app.command("tiny")(tiny)
    return app


if __name__ == "__main__":
    sys.exit(main())
