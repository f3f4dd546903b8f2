"""What is shipped: written, read, proven, used."""

from .manifest import is_whole, read_manifest
from .proof import Finding, check
from .use import predict
from .write import export

__all__ = ["Finding", "check", "export", "is_whole", "predict", "read_manifest"]
