"""Agreement: no labels at all, the original's own answers are what a candidate is held to."""
