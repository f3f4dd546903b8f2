"""What is shipped: written, read, proven, used."""

from .manifest import read_manifest
from .proof import Finding, check
from .use import MaskPrediction, Prediction, predict
from .write import export

__all__ = ["Finding", "MaskPrediction", "Prediction", "check", "export", "predict", "read_manifest"]
