"""Valid configurations, and the errors of invalid ones."""

import dataclasses
import inspect
import pickle
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shardit
from shardit.config import (
    TIMEOUT_S,
    DiffusionParallelConfig,
    config_of,
    fitting_partition,
    get_pp_indices,
    parse_layer_partition,
    partition_chunks,
    resolve_layer_partition,
)
from shardit.core.comm.mesh import init_mesh
from shardit.engine.engine_args import SIZES, EngineArgs
from shardit.engine.process.messages import SessionSpec
from shardit.errors import InputError
from shardit.language.options import LanguageOptions
from shardit.language.request.sampling_params import SamplingParams
from shardit.parallel_state import initialize_model_parallel
from shardit.params import OmniDiffusionSamplingParams
from shardit.training.settings import TrainSettings
from shardit.training.staged import stages

OURS, THEIRS = "SHARDIT_PP_LAYER_PARTITION", "VLLM_PP_LAYER_PARTITION"


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_defaults_are_one_rank():
    config = DiffusionParallelConfig()
    assert config.world_size == 1
    assert config.pipeline_chunks is None
    assert config.layer_partition is None
    assert config.sequence_parallel_size is None
    assert config.split_batch is True


def test_config_is_frozen_and_travels():
    config = DiffusionParallelConfig(pipeline_parallel_size=2, layer_partition=[3, 5])
    assert config.layer_partition == (3, 5)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(dataclasses.replace(config))
    assert config.world_size == 2


@pytest.mark.parametrize(
    ("made", "name", "word"),
    [
        (DiffusionParallelConfig(), "ring_degree", "config"),
        (SamplingParams(), "n", "params"),
        (OmniDiffusionSamplingParams(), "seed", "params"),
        (EngineArgs(), "max_num_seqs", "args"),
    ],
)
def test_an_attribute_that_is_set(made, name, word):
    says = re.escape(f"{type(made).__name__} does not change; make another: dataclasses.replace({word}, {name}=3)")
    with pytest.raises(dataclasses.FrozenInstanceError, match=says):
        setattr(made, name, 3)
    assert getattr(dataclasses.replace(made, **{name: 3}), name) == 3
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_degree_must_be_a_positive_whole_number(value):
    with pytest.raises(InputError, match="pipeline_parallel_size must be a whole number of at least 1") as error:
        DiffusionParallelConfig(pipeline_parallel_size=value)
    one_line(error)


def test_sequence_parallel_size_is_the_product():
    assert DiffusionParallelConfig(sequence_parallel_size=1).world_size == 1
    with pytest.raises(InputError, match="must equal ulysses_degree x ring_degree"):
        DiffusionParallelConfig(sequence_parallel_size=2)


@pytest.mark.parametrize(("name", "value"), [("pipeline_chunks", 0), ("pipeline_chunks", True), ("split_batch", 1)])
def test_other_fields_are_checked(name, value):
    with pytest.raises(InputError, match=name):
        DiffusionParallelConfig(**{name: value})


def test_misspelt_field_gets_a_suggestion():
    with pytest.raises(InputError, match="did you mean 'pipeline_parallel_size'"):
        DiffusionParallelConfig(pipeline_paralel_size=2)


@pytest.mark.parametrize("partition", [[], [0, 8], [-1, 9], [True, 7], ["4", "4"], "4,4", 8, [4.0, 4]])
def test_partition_of_wrong_values(partition):
    with pytest.raises(InputError, match="layer_partition"):
        DiffusionParallelConfig(pipeline_parallel_size=2, layer_partition=partition)


@pytest.mark.parametrize(
    ("stages", "chunks", "partition", "expected"),
    [
        (2, None, [4, 4], 1),
        (2, 1, [4, 4], 1),
        (2, 2, [2, 2, 2, 2], 2),
        (2, None, [1, 2, 3, 4], 2),
        (1, None, [8], 1),
        (2, 2, [4, 4], None),
        (2, 1, [2, 2, 2, 2], None),
        (2, None, [2, 2, 4], None),
        (1, None, [4, 4], None),
    ],
)
def test_number_of_partition_entries(stages, chunks, partition, expected):
    def make():
        return DiffusionParallelConfig(stages, pipeline_chunks=chunks, layer_partition=partition)

    if expected is None:
        with pytest.raises(InputError, match=f"layer_partition has {len(partition)} entries"):
            make()
    else:
        assert partition_chunks(make(), partition, "layer_partition") == expected


def test_precedence_of_parameter_and_variables():
    environ = {OURS: "3,5", THEIRS: "5,3"}
    config = DiffusionParallelConfig(pipeline_parallel_size=2)
    given = dataclasses.replace(config, layer_partition=(1, 7))
    assert resolve_layer_partition(given, environ) == ((1, 7), "layer_partition")
    assert resolve_layer_partition(config, environ) == ((3, 5), OURS)
    assert resolve_layer_partition(config, {THEIRS: " 5, 3 "}) == ((5, 3), THEIRS)
    assert resolve_layer_partition(config, {OURS: "", THEIRS: "5,3"}) == ((5, 3), THEIRS)
    assert resolve_layer_partition(config, {}) == (None, "automatic")


@pytest.mark.parametrize("text", ["a,b", "8,", "8;8", "0,8", "-1,9", "4.0,4", "+4,4", "1_0,2", "٤,4", "4,4,4"])
@pytest.mark.parametrize("variable", [OURS, THEIRS])
def test_wrong_variable_is_named(text, variable):
    with pytest.raises(InputError, match=variable) as error:
        resolve_layer_partition(DiffusionParallelConfig(pipeline_parallel_size=2), {variable: text})
    one_line(error)


def test_partition_against_the_model():
    config = DiffusionParallelConfig(pipeline_parallel_size=2)
    assert fitting_partition(config, {OURS: "3,5"}, 8) == (3, 5)
    with pytest.raises(InputError, match=f"{OURS} 3,5 adds up to 8, but the transformer has 9 blocks"):
        fitting_partition(config, {OURS: "3,5"}, 9)
    with pytest.raises(InputError, match="needs 4"):
        fitting_partition(dataclasses.replace(config, pipeline_chunks=2), {OURS: "3,5"}, 8)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=16))
def test_partition_text_round_trip(partition):
    assert parse_layer_partition(",".join(map(str, partition)), "x") == tuple(partition)


@given(st.text(max_size=12))
def test_partition_text_is_read_or_refused(text):
    try:
        partition = parse_layer_partition(text, "x")
    except InputError:
        return
    assert partition
    assert all(entry >= 1 for entry in partition)


@given(st.data())
def test_even_partition(data):
    layers = data.draw(st.integers(1, 400))
    stages = data.draw(st.integers(1, min(layers, 64)))
    spans = [get_pp_indices(layers, rank, stages) for rank in range(stages)]
    sizes = [end - start for start, end in spans]
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == layers
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes)


@pytest.mark.parametrize(
    "arguments", [(0, 0, 1), (8, 2, 2), (8, -1, 2), (8, 0, 0), (2, 0, 3), (8.0, 0, 2), (8, True, 2), ("8", 0, 2)]
)
def test_even_partition_of_bad_input(arguments):
    with pytest.raises(InputError):
        get_pp_indices(*arguments)


@pytest.mark.parametrize(
    "statement",
    [
        "import shardit; dir(shardit); shardit.Output, shardit.OmniDiffusionSamplingParams",
        "import shardit.diffusion.request.build, shardit.diffusion.request.images, shardit.__main__",
        "import shardit.diffusion.output.encode, shardit.diffusion.preflight.preflight",
        "from shardit.cli import main; main(['--help']); main(['generate', '--help']); main(['generate', '--model=x'])",
    ],
)
def test_imports_are_light(statement):
    code = f"{statement}\nimport sys\nassert not {{'torch', 'diffusers', 'transformers', 'av'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_defaults_are_declared_once():
    options, arguments = ({item.name: item.default for item in fields(cls)} for cls in (LanguageOptions, EngineArgs))
    of_llm = {name: found.default for name, found in inspect.signature(shardit.LLM.__init__).parameters.items()}
    assert arguments.items() >= options.items()
    assert {*arguments} - {*of_llm} == set(SIZES)
    assert all(of_llm[name] == default for name, default in arguments.items() if name in of_llm)
    for function in (shardit.load, shardit.parallelize, init_mesh, initialize_model_parallel, stages):
        assert inspect.signature(function).parameters["timeout_s"].default is TIMEOUT_S
    for cls in (SessionSpec, EngineArgs, TrainSettings):
        assert cls.timeout_s is TIMEOUT_S


def test_public_names():
    assert set(shardit.__all__) <= set(dir(shardit))
    assert shardit.get_pp_indices is get_pp_indices
    with pytest.raises(AttributeError, match="nothing"):
        _ = shardit.nothing


def test_fields_as_keywords():
    assert config_of(None, {"pipeline_parallel_size": 2}, "Omni").world_size == 2
    given = DiffusionParallelConfig(split_batch=False)
    assert config_of(given, {}, "Omni") is given
    with pytest.raises(InputError, match="Omni: split_batch is a field of the parallel configuration"):
        config_of(given, {"split_batch": True}, "Omni")
    with pytest.raises(InputError, match=r"load takes no 'pipeline_paralel_size' .did you mean"):
        config_of(None, {"pipeline_paralel_size": 2}, "load", ["dtype"])
    with pytest.raises(InputError, match="must be a DiffusionParallelConfig, got 2"):
        config_of(2, {}, "parallelize")


def test_wrong_keywords_of_the_entry_points():
    with pytest.raises(InputError, match=r"Omni takes no 'pipeline_size'.*it takes: .*dtype.*split_batch"):
        shardit.Omni("tiny/flux", pipeline_size=2)
    with pytest.raises(InputError, match=r"parallelize takes no 'splitbatch' .did you mean 'split_batch'"):
        shardit.parallelize(object(), splitbatch=False)
    with pytest.raises(InputError, match="load: tensor_parallel_size is a field"):
        shardit.load("tiny/flux", DiffusionParallelConfig(), tensor_parallel_size=1)


@pytest.mark.parametrize("function", ["Omni", "load"])
def test_a_wrong_keyword_in_place_of_the_model_is_named(function):
    with pytest.raises(InputError, match=rf"{function} takes no 'model_id' .did you mean 'model'"):
        getattr(shardit, function)(model_id="tiny/flux")
    with pytest.raises(InputError, match="model"):
        getattr(shardit, function)()
