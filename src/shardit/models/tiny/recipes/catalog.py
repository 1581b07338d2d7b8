"""All recipes by name."""

from __future__ import annotations

from shardit.errors import InputError
from shardit.models.tiny.language import CONFIGURATIONS
from shardit.models.tiny.recipes import image, qwen, shapes, wan
from shardit.models.tiny.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {**image.RECIPES, **qwen.RECIPES, **wan.RECIPES, "shapes": shapes.RECIPE}


def recipe(name: str) -> Recipe:
    """Return the recipe of that name, or an InputError that lists the names of all tiny models."""
    if name not in RECIPES:
        pipelines, decoders = (", ".join(sorted(names)) for names in (RECIPES, CONFIGURATIONS))
        raise InputError(f"no tiny model {name!r}; there are: {pipelines}; language models: {decoders}")
    return RECIPES[name]
