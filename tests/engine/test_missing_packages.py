"""Packages that are not installed are named with the command that installs them; exit code 2."""

import subprocess
import sys

import pytest

from shardit.loading.missing_packages import import_failure, missing_package

HIDE = """
import importlib.metadata, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
version = importlib.metadata.version
def told(name):
    if name.replace("-", "_") == {package!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = told
sys.argv[0] = "shardit"
"""


def without(package, code, *arguments):
    command = [sys.executable, "-c", HIDE.format(package=package) + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("torch", ["inspect", "tiny/flux"]),
        ("torch", ["tiny", "flux", "folder"]),
        ("torch", ["chat", "tiny/llama"]),
        ("safetensors", ["complete", "tiny/llama", "--prompt", "x"]),
        ("diffusers", ["inspect", "tiny/flux"]),
        ("transformers", ["inspect", "tiny/flux"]),
        ("greenlet", ["generate", "--model", "tiny/flux", "--prompt", "x"]),
        ("av", ["generate", "--model", "tiny/wan2.2-t2v", "--prompt", "x", "--output", "x.mp4"]),
        ("av", ["serve", "tiny/wan2.2-t2v"]),
        ("fastapi", ["serve", "tiny/flux"]),
        ("uvicorn", ["serve", "tiny/flux"]),
        ("structlog", ["serve", "tiny/flux"]),
        ("prometheus_client", ["serve", "tiny/flux"]),
        ("typer", ["--version"]),
        ("PIL", ["--version"]),
    ],
)
def test_commands(package, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHARDIT_CACHE", str(tmp_path / "cache"))
    done = without(package, "from shardit.__main__ import main; sys.exit(main())", *arguments)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"pip install {package.replace('_', '-').replace('PIL', 'pillow')}" in line


def test_a_failed_import_is_found_below_other_errors():
    missing = ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
    late = RuntimeError("Failed to import diffusers.models")
    late.__cause__ = missing
    assert import_failure(late) is import_failure(missing) is missing
    assert import_failure(RuntimeError("else")) is None


def test_modules_of_python_itself_are_not_installed_by_pip():
    error = missing_package(ModuleNotFoundError("No module named '_sqlite3'", name="_sqlite3"))
    assert "built without its module _sqlite3" in str(error)


def test_names_of_the_package():
    code = """
from shardit import InputError
try:
    from shardit import load
except InputError as error:
    print(error)
"""
    assert "pip install torch" in without("torch", code).stdout
