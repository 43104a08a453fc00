"""Functions that return a `Run`, each value with its source."""

from mellum2_megatron.recipes.registry import describe_recipes, recipe, recipe_names, register

__all__ = ["describe_recipes", "recipe", "recipe_names", "register"]
