"""What the numbers were made with."""

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in (
        "downres",
        "torch",
        "torchvision",
        "timm",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "openvino",
        "nncf",
        "scikit-learn",
        "numpy",
        "pillow",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
