"""Reports missing packages with the command that installs them. Imports none of them."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable

from shardit.errors import InputError

_PIP = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "google": "protobuf",
    "python_multipart": "python-multipart",
    "huggingface_hub": "huggingface-hub",
    "imageio": "imageio[ffmpeg]",
    "prometheus_client": "prometheus-client",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Names in pip of packages with another import name."""


_DISTRIBUTION = re.compile(r"'([\w.-]+?)[<>=!~ ].*'")


def pip_line(packages: Iterable[str]) -> str:
    """Return the pip command that installs packages, given by import name."""
    return "pip install " + " ".join(dict.fromkeys(_PIP.get(name, name) for name in packages))


def missing_package(error: ImportError) -> InputError:
    """Return the InputError for a module that cannot be imported, with the command that installs it."""
    text = " ".join(str(error).split())
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return InputError(f"a package cannot be used ({text}); install it again, or a version that fits the others")
    named = _DISTRIBUTION.search(error.name)  # importlib.metadata may have a sentence in place of a name
    module = named[1] if named else error.name.partition(".")[0]
    if module == "torch":
        return InputError("torch is not installed; pip install torch, in the build for your machine (pytorch.org)")
    if module.lstrip("_") in sys.stdlib_module_names:
        return InputError(f"this Python was built without its module {module}; use another build of Python")
    return InputError(f"the module {module} is not installed; {pip_line([module])}")


def import_failure(error: BaseException) -> ImportError | None:
    """Return the failed import that an error comes from, such as the RuntimeError of a module that diffusers imports
    late; None if there is none."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ImportError):
        cause = cause.__cause__
    return cause


FRAMEWORKS = ("torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "greenlet", "numpy", "tqdm")
"""Packages without which no model can be loaded; a pipeline needs diffusers, too."""

SERVER = (
    *("fastapi", "uvicorn", "h11", "pydantic", "starlette", "anyio"),
    *("python_multipart", "prometheus_client", "structlog"),
)
"""Packages without which the server cannot start; those of uvicorn and starlette, too."""


def check_installed(packages: Iterable[str]) -> None:
    """Raise InputError, with the command that installs it, for the first package that is missing."""
    for name in packages:
        if is_missing(name):
            raise missing_package(ModuleNotFoundError(f"No module named {name!r}", name=name))


def is_missing(package: str) -> bool:
    """Return whether a package cannot be imported here."""
    package = "google.protobuf" if package == "protobuf" else package
    try:
        return sys.modules.get(package) is None and importlib.util.find_spec(package) is None
    except (ImportError, ValueError):
        return True
