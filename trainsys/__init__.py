"""A DeepSpeed-based trainer: recipes, command line, data, models, metrics.

`trainsys.recipe.load` reads a recipe, `trainsys.session` starts it; the command line is `trainsys --help`.
"""

from trainsys.errors import ConfigError, MissingExtraError, NumericsError, RunError, TrainsysError

__all__ = ["ConfigError", "MissingExtraError", "NumericsError", "RunError", "TrainsysError"]
