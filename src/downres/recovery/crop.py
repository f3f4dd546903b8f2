"""Crop ratio: how much of the picture a lower resolution should look at."""


def crop_options(native: float) -> tuple[float, ...]:
    """The native crop ratio first, then the common ones: the best changes with the resolution (Touvron 2019, FixRes)."""
    return (native, *(ratio for ratio in (1.0, 0.875) if abs(ratio - native) > 0.02))
