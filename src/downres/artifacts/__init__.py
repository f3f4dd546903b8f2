"""What is shipped: written, read, proven, used."""

from .embed import embed
from .manifest import Embedded, is_whole, read_manifest
from .proof import Finding, check
from .use import predict
from .write import export

__all__ = ["Embedded", "Finding", "check", "embed", "export", "is_whole", "predict", "read_manifest"]
