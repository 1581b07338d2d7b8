"""Imports of the fork server, made once so that a rank starts in milliseconds: the packages, this one, and shared test
modules. It also runs pipelines, since the first call of many functions takes longer than all later ones."""

import gc
import importlib
import os
import pkgutil

import diffusers
import torch
from tqdm import tqdm

import shardit
from tests.support import brought

torch.set_num_threads(1)
for _name in ("greenlet", "hypothesis", "peft", "pytest", "transformers", "tests.pipelines.runs"):
    importlib.import_module(_name)
for _name in ("guided", "whole_pipelines"):
    importlib.import_module(f"tests.support.{_name}")
for _name in (
    "AutoPipelineForText2Image",  # imports the pipelines of most models
    "LongCatImageEditPipeline",
    "LongCatImagePipeline",
    "OvisImagePipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "WanImageToVideoPipeline",
    "WanPipeline",
):
    getattr(diffusers, _name)
for _package in ("core", "diffusion", "loading", "models", "parallel"):
    for _found in pkgutil.walk_packages([f"{shardit.__path__[0]}/{_package}"], f"shardit.{_package}."):
        importlib.import_module(_found.name)
importlib.import_module("shardit.engine.session")
# A fork would not have the threads of tokenizers and of progress bars.
os.environ["TOKENIZERS_PARALLELISM"] = "false"
tqdm.monitor_interval = 0
with torch.random.fork_rng():
    for _name in ("flux", "wan2.2-t2v"):
        brought.run(brought.pipeline(_name), _name, num_inference_steps=1, output_type="np")
# Kept out of the collector's sight, the pages of what was imported stay shared.
gc.collect()
gc.freeze()
