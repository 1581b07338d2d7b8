"""What the fork server imports once, so that a rank starts in milliseconds: the packages, this one, and what modules
of tests share."""

import gc
import importlib
import pkgutil

import diffusers
import torch

import shardit

torch.set_num_threads(1)
for _name in ("greenlet", "hypothesis", "peft", "pytest", "transformers", "tests.pipelines.runs"):
    importlib.import_module(_name)
for _name in ("brought", "guided", "whole_pipelines"):
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
# Kept out of the collector's sight, the pages of what was imported stay shared.
gc.collect()
gc.freeze()
