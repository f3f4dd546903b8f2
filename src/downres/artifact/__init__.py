"""What is shipped: written, read, proven, used."""

from .check import Finding, check
from .export import export
from .manifest import read_manifest
from .predict import MaskPrediction, Prediction, predict

__all__ = ["Finding", "MaskPrediction", "Prediction", "check", "export", "predict", "read_manifest"]
