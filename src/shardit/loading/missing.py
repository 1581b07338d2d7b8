"""Reports missing packages with the command that installs them. Imports none of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable

from shardit.errors import InputError

_PIP = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "google": "protobuf",
    "huggingface_hub": "huggingface-hub",
    "imageio": "imageio[ffmpeg]",
    "prometheus_client": "prometheus-client",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Names in pip of packages with another import name."""


def pip_line(packages: Iterable[str]) -> str:
    """Return the pip command that installs packages, given by import name."""
    return "pip install " + " ".join(dict.fromkeys(_PIP.get(name, name) for name in packages))


def missing_package(error: ImportError) -> InputError:
    """Return the InputError for a module that cannot be imported, with the command that installs it."""
    text = " ".join(str(error).split())
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return InputError(f"a package cannot be used ({text}); install it again, or a version that fits the others")
    module = error.name.partition(".")[0]
    if module == "torch":
        return InputError("torch is not installed; pip install torch, in the build for your machine (pytorch.org)")
    return InputError(f"the module {module} is not installed; {pip_line([module])}")


def is_missing(package: str) -> bool:
    """Return whether a package cannot be imported here."""
    package = "google.protobuf" if package == "protobuf" else package
    try:
        return sys.modules.get(package) is None and importlib.util.find_spec(package) is None
    except (ImportError, ValueError):
        return True
