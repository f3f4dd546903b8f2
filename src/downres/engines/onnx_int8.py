"""8-bit ONNX files by ONNX Runtime's own quantizer: QDQ, weights per channel, activations by calibration."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime import InferenceSession
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from ..errors import DownresError, first_line
from .engine import (
    BY_NNCF,
    RANGES,
    Batches,
    Layers,
    Quantization,
    QuantizationFailed,
    after,
    is_head,
    plain_name,
    quiet,
    sums_saturate,
)

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that have weights, and nearly all of the arithmetic."""
BETWEEN = ("Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool", "Resize", "Clip", "Relu", "LeakyRelu")
"""What stands between them in a convnet, and would else go to float and back."""


class _Images(CalibrationDataReader):
    """The calibration batches one at a time, so that only what one of them leaves is held."""

    def __init__(self, name: str, images: Batches) -> None:
        self.name, self.count = name, images.count
        self.source = images.make()
        self.left = 0

    def __len__(self) -> int:
        return self.count

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = end_index - start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        if not self.left:
            return None
        self.left -= 1
        return {self.name: np.ascontiguousarray(next(self.source), dtype=np.float32)}


def quantize_onnx(
    source: Path, path: Path, images: Batches, how: Quantization, head: np.ndarray | None, ranges: Path | None = None
) -> None:
    """Writes the graph of `source` with convolutions, linear layers and what lies between them in 8 bits; see
    `Engine.quantize`.

    BatchNorms are folded into convolutions first. What makes the answer after the last layer stays in float. Of a network with
    attention the linear layers alone are quantized: products of activations, softmax and layer norms lose too much in 8 bits.
    Where 8-bit sums would overflow (x86 without VNNI) weights have 7 bits.
    """
    with tempfile.TemporaryDirectory(prefix="downres-") as place, quiet():
        folded = Path(place) / "folded.onnx"
        try:
            quant_pre_process(source, folded, skip_symbolic_shape=True)
            graph = onnx.load(folded)
            transformer = is_transformer(graph)
            by_weight = _by_weight(graph)
            if unknown := set(how.kept) - by_weight.keys():
                raise QuantizationFailed(f"there is no layer {min(unknown)} in it")
            kept = [node for name in how.kept for node in by_weight[name]]
            left = {*kept, *_from_head(graph, head), *_answering(graph)}
            if how.ranges == BY_NNCF:
                onnx.save(_by_nncf(graph, images, left, transformer), path)
                InferenceSession(path, providers=["CPUExecutionProvider"])  # which does not take every graph of NNCF's
            else:
                quantize_static(
                    folded,
                    path,
                    _Images(graph.graph.input[0].name, images),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=["Conv", "Gemm", "MatMul"] if transformer else [*LAYERS, *BETWEEN],
                    per_channel=True,
                    reduce_range=sums_saturate(),
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=sorted(left | set(_products(graph) if transformer else ())),
                    calibrate_method=_METHODS[how.ranges],
                    calibration_cache_path=ranges,
                    extra_options={"CalibStridedMinMax": 1, "DedicatedQDQPair": False},
                )
        except (DownresError, OSError):
            raise
        except Exception as error:  # whatever the quantizer fails with on a graph that it was not written for
            raise QuantizationFailed(f"onnxruntime cannot quantize it ({first_line(error)[:200]})") from error
    if not layers_of(path).quantized:
        raise QuantizationFailed("onnxruntime found no layer in it that it quantizes")


def _by_nncf(graph: onnx.ModelProto, images: Batches, left: set[str], transformer: bool) -> onnx.ModelProto:
    from .nncf_int8 import quantized

    made: onnx.ModelProto = quantized(
        graph, images, left, transformer, RANGES[0], input_name=graph.graph.input[0].name, half=sums_saturate()
    )
    return made


def is_transformer(graph: onnx.ModelProto) -> bool:
    """Whether two activations are multiplied and a softmax is taken: attention."""
    return bool(_products(graph)) and any(node.op_type == "Softmax" for node in graph.graph.node)


def _products(graph: onnx.ModelProto) -> list[str]:
    """Matrix products of two activations."""
    known = {one.name for one in graph.graph.initializer}
    return [n.name for n in graph.graph.node if n.op_type == "MatMul" and not known & set(n.input)]


def _from_head(graph: onnx.ModelProto, head: np.ndarray | None) -> set[str]:
    """The layer that has these weights, and all that comes after it; nothing where no layer has them."""
    if head is None:
        return set()
    values = {one.name: one for one in graph.graph.initializer if tuple(one.dims) in (head.shape, head.shape[::-1])}
    same = {name for name, one in values.items() if is_head(numpy_helper.to_array(one), head)}
    return after([node.name for node in graph.graph.node if same & set(node.input)], _followers(graph))


def _answering(graph: onnx.ModelProto) -> set[str]:
    """What comes after all layers and makes the answer of theirs: logits brought to full size would have 256 values."""
    before: dict[str, list[str]] = {}
    for name, followers in _followers(graph).items():
        for follower in followers:
            before.setdefault(follower, []).append(name)
    layers = [node.name for node in graph.graph.node if node.op_type in LAYERS]
    return {node.name for node in graph.graph.node} - after(layers, before)


def _followers(graph: onnx.ModelProto) -> dict[str, list[str]]:
    """Node → the nodes that take what it gives."""
    taken: dict[str, list[str]] = {}
    for node in graph.graph.node:
        for name in node.input:
            taken.setdefault(name, []).append(node.name)
    return {node.name: [follower for out in node.output for follower in taken.get(out, ())] for node in graph.graph.node}


def layers_of(file: Path) -> Layers:
    """Which of the layers with weights compute in 8 bits."""
    graph = onnx.load(file).graph
    made_by = {out: node.op_type for node in graph.node for out in node.output}
    known = {one.name for one in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    found: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for node in graph.node:
        if node.op_type in LAYERS and (node.op_type != "MatMul" or any(_is_weight(i, known, made_by) for i in node.input)):
            in_8_bits = all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2])
            found[in_8_bits][node.op_type] = found[in_8_bits].get(node.op_type, 0) + 1
    return Layers(found[True], found[False])


def _is_weight(name: str, known: set[str], made_by: dict[str, str]) -> bool:
    return name in known or made_by.get(name) == "DequantizeLinear"


def layer_names(file: Path, head: np.ndarray | None) -> list[str]:
    """The layers with weights that are quantized unless they are kept, by the names that `Quantization.kept` takes, in the
    order in which they run."""
    with tempfile.TemporaryDirectory(prefix="downres-") as place, quiet():
        quant_pre_process(file, folded := Path(place) / "folded.onnx", skip_symbolic_shape=True)
        graph = onnx.load(folded)
    left = _from_head(graph, head)
    return [name for name, nodes in _by_weight(graph).items() if not left & set(nodes)]


def _by_weight(graph: onnx.ModelProto) -> dict[str, list[str]]:
    """Name of a weight → the nodes that it is the weight of, in the order in which they run."""
    known, found = {one.name for one in graph.graph.initializer}, dict[str, list[str]]()
    for node in graph.graph.node:
        if node.op_type in LAYERS and (weight := next((name for name in node.input[:2] if name in known), "")):
            found.setdefault(plain_name(weight), []).append(node.name)
    return found


def quantize_linear(exported: Path, path: Path) -> None:
    """The weights of linear layers of an exported network in 8 bits, the range of what they multiply taken in each pass
    (ONNX Runtime's dynamic quantization, a scale a channel); attention's own products and all else stay in float.
    """
    how = {"per_channel": True, "weight_type": QuantType.QInt8, "reduce_range": sums_saturate()}
    quantize_dynamic(exported, path, op_types_to_quantize=["MatMul", "Gemm"], **how)
