"""The ways to look at fewer pixels or tokens, one file each; the order here is that of a candidate's text."""

from .patch import PATCH
from .precision import PRECISION
from .pruning import PRUNING
from .resolution import RESOLUTION
from .runtime import RUNTIME
from .scaling import DEPTH, WIDTH
from .stem import STEM
from .technique import Design, Style, Technique, register, techniques, unregister
from .tokens import TOKENS, Merge

for _technique in (RESOLUTION, STEM, PATCH, TOKENS, DEPTH, WIDTH, PRUNING, PRECISION, RUNTIME):
    register(_technique)

__all__ = [
    "Design", "Merge", "Style", "Technique", "register", "techniques", "unregister", "RESOLUTION", "PRECISION", "RUNTIME",
]  # fmt: skip
