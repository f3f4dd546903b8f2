"""What is shipped: written, read, proven, used."""

from .manifest import read_manifest
from .proof import Finding, check
from .use import predict
from .write import export

__all__ = ["Finding", "check", "export", "predict", "read_manifest"]
