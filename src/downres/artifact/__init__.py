"""What is shipped: written, read, proven, used."""

from .proof import Finding, check
from .write import export
from .manifest import read_manifest
from .use import MaskPrediction, Prediction, predict

__all__ = ["Finding", "MaskPrediction", "Prediction", "check", "export", "predict", "read_manifest"]
