"""What is wrong whatever the weights are is found before torch is imported."""

import inspect
import os
import subprocess
import sys

import pytest

from shardit.models import tiny
from shardit.static_signature import static_signature, static_signatures_of_model

RUN = "import sys; from shardit.cli import main; code = main(); sys.exit(99 if 'torch' in sys.modules else code)"
GENERATE = ["generate", "--prompt", "a", "--model"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([*GENERATE, "tiny/flux", "--output", "x.gif"], "use an extension among"),
        ([*GENERATE, "tiny/flux", "--output", "x.mp4"], "does not fit an image"),
        ([*GENERATE, "tiny/flux", "--output", "nowhere/x.png"], "does not exist"),
        ([*GENERATE, "tiny/flux", "--num-frames", "9"], "takes no num_frames"),
        ([*GENERATE, "tiny/flux", "--extra", "sed=1"], "takes no 'sed' (did you mean 'seed'?)"),
        ([*GENERATE, "tiny/flux", "--extra", "latents=x.pt"], "latents must be a tensor, got 'x.pt'"),
        ([*GENERATE, "tiny/flux", "--height", "0"], "height must be a whole number"),
        ([*GENERATE, "tiny/wan2.2-i2v"], "needs an image"),
        ([*GENERATE, "tiny/fluxx"], "no tiny model 'fluxx'"),
        ([*GENERATE, "./nowhere"], "there is no folder"),
        (["serve", "./nowhere"], "there is no folder"),
        (["serve", "tiny/fluxx"], "no tiny model 'fluxx'"),
    ],
)
def test_mistakes_are_found_without_torch(tmp_path, words, text):
    done = subprocess.run([sys.executable, "-c", RUN, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_names_an_unknown_class_is_left_to_the_ranks(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    assert static_signatures_of_model(tmp_path) == (None, None)


@pytest.mark.parametrize("name", tiny.names())
def test_signatures_from_the_source(name):
    import diffusers

    from shardit.models.tiny.catalog import recipe
    from shardit.signature import signature_of

    found, with_image = static_signatures_of_model(f"tiny/{name}")
    cls = getattr(diffusers, recipe(name).pipeline)
    assert found == signature_of(cls, recipe(name).config)
    assert (with_image is not None) == (name == "wan2.2-ti2v")


@pytest.mark.full
def test_names_of_all_pipelines_from_the_source():
    import diffusers

    from shardit.signature import signature_of

    found = [getattr(diffusers, name, None) for name in dir(diffusers) if name.endswith("Pipeline")]
    classes = [
        cls
        for cls in found
        if inspect.isclass(cls)
        and cls.__module__.startswith("diffusers.pipelines.")
        and "__call__" in dir(cls)
        and cls.__name__ != "DiffusionPipeline"
    ]
    assert len(classes) > 200
    for cls in classes:
        parsed = static_signature(cls.__name__)
        assert parsed is not None, cls
        assert (parsed.names, parsed.required) == (signature_of(cls).names, signature_of(cls).required)


@pytest.mark.parametrize(
    ("module", "words"),
    [("torch", ["serve", "tiny/flux", "--port=0", "--data-dir=data"]), ("diffusers", [*GENERATE, "tiny/flux"])],
)
def test_a_missing_package_is_told_once_with_the_way_to_install_it(tmp_path, module, words):
    package = tmp_path / "shadow" / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise ModuleNotFoundError('No module named', name={module!r})")
    path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "shardit", *words]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert f"pip install {module}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
