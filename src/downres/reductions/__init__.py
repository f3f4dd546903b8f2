"""Ways to look at fewer pixels."""

from .reduce import Reduction, reduce

__all__ = ["Reduction", "reduce"]
