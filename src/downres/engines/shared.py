"""Several ONNX graphs whose large tensors lie in one file beside them, each once."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

from ..record import write_whole

LEAST_BYTES = 1024
"""Of a tensor that is put there; smaller ones cost more to name than to repeat."""
_ALIGNED = 64


def share_tensors(files: Sequence[Path], weights: Path) -> None:
    """Rewrites the files, all in the folder of `weights`: a tensor that is the same to the byte in several is kept once.

    What the exporter tells of where an operator came from, which is half of a small graph, is left out.
    """
    content, where = bytearray(), dict[bytes, int]()
    for file in files:
        model = onnx.load(file)
        for tensor in model.graph.initializer:
            raw = onnx.numpy_helper.to_array(tensor).tobytes()
            if len(raw) < LEAST_BYTES:
                continue
            if raw not in where:
                content.extend(bytes(-len(content) % _ALIGNED))
                where[raw] = len(content)
                content.extend(raw)
            for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(field)
            tensor.raw_data = b""
            set_external_data(tensor, weights.name, offset=where[raw], length=len(raw))
            tensor.ClearField("raw_data")
        for one in (model, model.graph, *model.graph.node, *model.graph.value_info):
            del one.metadata_props[:]
            one.doc_string = ""
        write_whole(file, model.SerializeToString())
    write_whole(weights, bytes(content))
