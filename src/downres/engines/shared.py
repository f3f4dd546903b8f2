"""Several ONNX graphs whose large tensors lie in one file beside them, each once."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, set_external_data, uses_external_data

from ..errors import DownresError
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


def whole(file: Path) -> bytes:
    """The content of a graph with all its tensors inside, for a runtime that is given bytes: it would look for others in the
    folder that the process happens to be in.
    """
    content = file.read_bytes()
    try:
        model = onnx.load_from_string(content)
    except Exception:  # no graph: the runtime says so
        return content
    outside = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    for tensor in outside:
        info = ExternalDataInfo(tensor)
        if info.location != Path(info.location).name:
            raise DownresError(f"{file} has its weights in another folder ({info.location[:40]!r}): export the model again.")
        with open(file.parent / info.location, "rb") as weights:
            weights.seek(info.offset or 0)
            tensor.raw_data = weights.read(info.length) if info.length is not None else weights.read()
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
    return model.SerializeToString() if outside else content
