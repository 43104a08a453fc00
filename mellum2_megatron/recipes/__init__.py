"""Functions that return a `Run`, each value with its source."""

from mellum2_megatron.recipes.own_file import recipe_origin
from mellum2_megatron.recipes.registry import describe_recipes, recipe, recipe_names, register

__all__ = ["describe_recipes", "recipe", "recipe_names", "recipe_origin", "register"]
