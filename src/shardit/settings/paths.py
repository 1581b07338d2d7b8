"""Checks of paths that users give."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from shardit.errors import InputError

_SHOWN = 60
"""Characters of a path in messages about its length."""

_OPEN_FILES = ("/dev/", "/proc/")
"""Folders with the open files of a process."""


def user_path(what: str, value: str | os.PathLike[str]) -> Path:
    """Return a path with ~ expanded, whether or not something is there. Raises InputError as `check_name` does, and for
    the home of an unknown user; `what` begins the message."""
    check_name(what, value)
    try:
        path = Path(value).expanduser()
    except RuntimeError:
        raise InputError(f"{what} {os.fspath(value)}: {NO_HOME}") from None
    check_name(what, path)
    return path


NO_HOME = "there is no user of that name, or none with a home folder; write the whole path"
"""An error for a path with ~."""


def home_folder(advice: str) -> Path:
    """Return the user's home folder. Raises InputError if there is none, as in some containers; `advice` ends it."""
    try:
        return Path.home()
    except RuntimeError:
        raise InputError(f"this user has no home folder, and HOME is not set; {advice}") from None


def check_name(what: str, path: str | os.PathLike[str]) -> None:
    """Raise InputError for a path that cannot exist or be looked at: too long, with a null character, in a folder
    without permission. pathlib's own methods raise OSError for these. The same for a named pipe, which may never have
    data; a pipe that is open already, as of `<(command)` in a shell, is taken."""
    text = os.fspath(path)
    try:
        found = os.stat(text).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError:
        raise InputError(f"{what} {text[:_SHOWN]!r} holds a null character; leave it out") from None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise InputError(f"{what} {text} cannot be used: {error.strerror}; choose another") from None
        length = max(len(os.fsencode(part)) for part in Path(text).parts)
        shown = f"{text[:_SHOWN]}..." if len(text) > _SHOWN else text
        raise InputError(f"{what} {shown} is too long (a name of {length} bytes); choose a shorter one") from None
    if stat.S_ISDIR(found) and not os.access(text, os.X_OK):
        raise InputError(f"{what} {text} cannot be used: {os.strerror(errno.EACCES)}; choose another")
    if stat.S_ISFIFO(found) and not os.path.realpath(text).startswith(_OPEN_FILES):
        raise InputError(f"{what} {text} is a named pipe, not a regular file; choose another")


def model_files(folder: Path) -> list[str]:
    """Return the names of the files of a model or an adapter in a folder, sorted."""
    return sorted(path.name for pattern in _OF_MODELS for path in folder.glob(pattern))


_OF_MODELS = ("model_index.json", "config.json", "adapter_config.json", "*.safetensors", "*.gguf")


def is_hub_id(model: str) -> bool:
    """Return whether a text has the form of a hub id: a name, or owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True
