"""The commands next to `shardit generate`: serve, inspect, tiny."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from shardit.engine.process.process import is_first_rank
from shardit.errors import InputError
from shardit.flags import InspectFlags
from shardit.loading.dtypes import setting
from shardit.loading.missing_packages import FRAMEWORKS, SERVER, check_installed
from shardit.logs import FORMAT_VARIABLE

if TYPE_CHECKING:
    from shardit.server.flags import ServeFlags
    from shardit.server.options import ServeOptions


def serve(flags: ServeFlags) -> int:
    """Serve a model over HTTP: OpenAI's interface, jobs that survive crashes, and a page."""
    from shardit.engine.process.process import started_by_torchrun

    check_installed(SERVER)
    options = flags.options()
    os.environ[FORMAT_VARIABLE] = flags.log_format.value  # all processes of the server inherit it
    if not options.of_language:
        _check_pipeline(options)
    if started_by_torchrun(os.environ):
        from shardit.server.entry.torchrun_agent import serve_as_rank

        return serve_as_rank(options)
    from shardit.server.entry.serve import serve as run

    return run(options)


def _check_pipeline(options: ServeOptions) -> None:
    from shardit.diffusion.preflight import preflight
    from shardit.diffusion.preflight.static_signature import static_signatures_of_model
    from shardit.server.unservable import unservable

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


def inspect(flags: InspectFlags) -> None:
    """Show what each rank would hold; reads no weights."""
    config, dtype = flags.parallel_config(), setting(flags.dtype, "--dtype")
    check_installed(("diffusers", *FRAMEWORKS))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of every missing optional package
    from shardit.diffusion.loading.shipped import configurations
    from shardit.diffusion.preflight import preflight
    from shardit.language.loading.source import known_decoder, named_decoder
    from shardit.settings.model_options import model_options

    options, source = model_options(variant=flags.variant), known_decoder(flags.what())
    configs = configurations(flags.what(), flags.variant) if source is None else None
    if source is None and configs is None:
        source = named_decoder(flags.what())
    if source is not None:
        from shardit.language.preflight import check_decoder, check_decoder_options

        check_decoder_options(flags.what(), {}, options)
        check_decoder(source, config, None, weights=source.has_weights)
        from shardit.engine.inspect_language import inspect_decoder

        return _show(inspect_decoder(source, config, dtype), flags.json)
    if configs is None:
        preflight.check(flags.what(), config, options, dtype=dtype, packages=False)
    else:
        preflight.check(configs, config, model_options(), dtype=dtype, files=False, packages=False)
    from shardit.engine.inspect import inspect_model

    _show(inspect_model(flags.what(), config, dtype=dtype, variant=flags.variant), flags.json)
    return None


def _show(document: dict[str, Any], as_json: bool) -> None:
    if is_first_rank(os.environ):
        print(json.dumps(document) if as_json else table(document))


def table(document: dict[str, Any]) -> str:
    """Return the document of `shardit inspect --json` for people."""
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
    """Write a tiny checkpoint, a complete folder of diffusers (or transformers, as for llama) to try things on."""
    from shardit.models import tiny as checkpoints

    check_installed(("diffusers", *FRAMEWORKS))
    written = checkpoints.write(name, folder)
    if is_first_rank(os.environ):
        print(written or folder)
