"""Reads the settings of a request from a saved file and converts them to flags that make the file again."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardit.diffusion.loading.variants import image_pipeline_name
from shardit.diffusion.output.encode import EXIF_DESCRIPTION, LEFT_OUT
from shardit.diffusion.request.pipeline_signature import PipelineSignature, same_setting
from shardit.diffusion.request.step_lists import replaced_steps
from shardit.errors import InputError
from shardit.loading.missing_packages import missing_package
from shardit.settings.model_options import WHOLE
from shardit.settings.paths import check_name, user_path

# Entries of a record that are not arguments of the pipeline.
_ABOUT = (
    "software",
    "pipeline",
    "revision",
    "file_revisions",
    "versions",
    "ranks",
    "made",
    "input_image_sizes",
    "sample_rate",
    LEFT_OUT,
)
_OF_FOLDER = 64
"""Digits of a folder's revision (`revision_of`); a commit of the hub has 40."""
# Placeholders in `Request.settings` for values that a file does not contain.
_NOT_HELD = {
    "numbers": re.compile(r"(Tensor|Parameter|ndarray)\([\d, ]*\)"),
    "an image": re.compile(r"picture \d+x\d+"),
    "images": re.compile(r"\d+ pictures \d+x\d+"),
}
_PROMPT = re.compile(r"(\w+_)?prompt(_\d)?")
"""Names of arguments that are texts, so that none of their values is a placeholder."""
_TYPES: dict[str, type] = {
    "model": str,
    "versions": dict,
    "file_revisions": dict,
    "single_files": dict,
    "scheduler_args": dict,
    "input_image_sizes": list,
    "layer_partition": str,
    LEFT_OUT: list,
}
_OF_NO_RECORD = ("extra", "from_file", "output", "image")


def read_record(path: Path) -> dict[str, Any]:
    """Return the record in a file's metadata (`Output.record`). Raises InputError if the file has none."""
    check_name("--from-file", path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; give one that shardit has written")
    try:
        record = json.loads(_text(path))
    except ImportError as error:
        raise missing_package(error) from error
    except Exception as error:  # whatever a reader raises for a file by another program
        raise InputError(
            f"{path} does not say how it was made: shardit has not written it, or it was edited"
        ) from error
    if not isinstance(record, dict) or record.get("software") != "shardit" or record.get("model") is None:
        raise InputError(f"{path} does not say of which model it was made; give the settings as flags")
    record = {name: value for name, value in record.items() if value is not None or name not in _TYPES}
    edited = [name for name in record if not isinstance(record[name], _TYPES.get(name, object))]
    if edited := [*edited, *(name for name in _OF_NO_RECORD if name in record)]:
        raise InputError(f"{path}: its record was edited ({', '.join(edited)}); give the settings as flags")
    return record


def flags_of(
    record: Mapping[str, Any], known: Collection[str], given: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the flags that make a file again, and further arguments for --extra. known: names of all flags. given:
    names of flags and arguments from the user.

    Raises InputError for values that a file cannot contain.
    """
    for name in record.get(LEFT_OUT, ()):
        if name not in given:
            flag = f"--{name.replace('_', '-')}" if name in known else f"--extra {name}=VALUE"
            raise InputError(f"the file had no room for {name}; add {flag}")
    flags: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    own = (*_ABOUT, "scheduler_args", "single_files", *replaced_steps(record, given))
    for name, value in record.items():
        of_ranks = name == "parallel" and isinstance(value, dict)  # as "ranks" was called
        if name in own or of_ranks or (value is None and name in known):
            continue
        if any(same_setting(name, one) for one in given):
            continue
        if lacking := "" if _PROMPT.fullmatch(name) else _not_held(value):
            advice = "use shardit.Omni" if lacking == "numbers" else f"add --extra {name}=PATH"
            raise InputError(f"the file was made with {name} given as {lacking}, which it does not hold; {advice}")
        if name == "dtype" and isinstance(value, dict):
            value = ",".join(f"{component}={dtype}" for component, dtype in value.items())
        (flags if name in known else extra)[name] = value
    files = dict(record.get("single_files", {}))
    if WHOLE in files:
        flags.update(model=files.pop(WHOLE), config=record["model"])
    for flag, values in (("single_file", files), ("scheduler_arg", record.get("scheduler_args"))):
        if values:
            flags[flag] = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    return flags, extra


def check_model_is_local(path: Path, record: Mapping[str, Any]) -> None:
    """Raise InputError if a file was made by a model in a folder that is not here: its name looks like a hub id."""
    model, revision = str(record["model"]), record.get("revision")
    if isinstance(revision, str) and len(revision) == _OF_FOLDER and not user_path("model", model).exists():
        raise InputError(f"{path} was made by the model in the folder {model}, which is not here; give --model")


def check_fits(path: Path, model: str, given: Collection[str], takes: PipelineSignature) -> None:
    """Raise InputError if a file of another model has arguments, now among those `given`, that the pipeline of `model`
    does not take."""
    record = read_record(path)
    held = {name for name in given if name in record and (name, record[name]) != ("num_outputs_per_prompt", 1)}
    if record["model"] != model and (refused := sorted(held.difference(takes.choices))):
        raise InputError(
            f"{path} was made by {record['model']} with {', '.join(refused)}, which {takes.class_name} does not take; "
            "leave --model out, or give the settings as flags in place of --from-file"
        )


def _not_held(value: Any) -> str:
    """Return the part of a value that no file contains; "" if there is none."""
    if isinstance(value, (list, dict)):
        entries = value.values() if isinstance(value, dict) else value
        return next(filter(None, map(_not_held, entries)), "")
    return next((what for what, form in _NOT_HELD.items() if isinstance(value, str) and form.fullmatch(value)), "")


def differences(record: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    """List the packages whose versions differ from those in the record: the pixels may differ."""
    before = record.get("versions", {})
    return [
        f"the file was made with {name} {before[name]}, here is {versions.get(name, 'none')}: pixels may differ"
        for name in before
        if before[name] != versions.get(name)
    ]


def other_images(record: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Return a note if the input images, of these sizes, cannot be those in the record, else []."""
    before, now = (
        [f"{width}x{height}" for width, height in one] for one in (record.get("input_image_sizes", ()), sizes)
    )
    if before == now:
        return []
    there, here = (", ".join(one) or "none" for one in (before, now))
    return [f"the file was made from input images of {there}, here: {here}: the result will differ"]


def other_revision(record: Mapping[str, Any], takes: PipelineSignature) -> list[str]:
    """Return a note for the loaded model or its pipeline, and for each file of an adapter or a component, that has
    changed since the file was made."""
    made_by, before = takes.made_by, record.get("pipeline")
    names = takes.class_name, image_pipeline_name(takes.class_name, {"expand_timesteps": takes.native_fps})
    notes = [] if before in (None, *names) else [f"the file was made by {before}, here is {names[0]}: it will differ"]
    before, now = record.get("revision"), made_by.get("revision")
    if None not in (before, now) and before != now:
        notes.append(f"the file was made with revision {before} of the model, here is {now}: pixels may differ")
    there, here = record.get("file_revisions") or {}, made_by.get("file_revisions") or {}
    changed = [path for path in there if path in here and there[path] != here[path]]
    return notes + [f"{path} has changed since the file was made: pixels may differ" for path in changed]


def _text(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in (".png", ".jpg", ".jpeg", ".webp"):
        from PIL import Image

        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            return image.info["settings"] if suffix == ".png" else image.getexif()[EXIF_DESCRIPTION]
    if suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            return (file.metadata() or {})["settings"]
    import av

    with av.open(str(path)) as container:
        return container.metadata["comment"]
