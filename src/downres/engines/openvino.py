"""OpenVINO: its files, its 8 bits by NNCF, and running there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from ..errors import DownresError
from ..parse import BF16, FP16, FP32, INT8
from . import check_threads
from .engine import (
    PROFILED,
    Batches,
    Engine,
    Layers,
    Operator,
    Quantization,
    QuantizationFailed,
    after,
    is_head,
    plain_name,
    quiet,
)

_HINTS = {FP32: "f32", BF16: "bf16", FP16: "f16", INT8: "f32"}
"""What is asked for whatever is not in 8 bits: by itself OpenVINO takes bf16 or f16 where the processor has them."""
_NO_WORK = ("Input", "Const", "Output")
_CONVERSIONS = ("Reorder", "Convert", "FakeQuantize")
"""Of the graph that runs."""
_LAYERS = ("Convolution", "GroupConvolution", "MatMul")


class OpenVino:
    """One model in OpenVINO, made for latency; compiled anew for each batch size, whose shapes are then fixed.

    model: a path (.xml beside its .bin, .onnx). precision: of what is not in 8 bits; refused where the device does not keep to
    it. limit_s: seconds that one image may take. hints: what OpenVINO says it runs with.
    Raises DownresError when the content is not a model that OpenVINO can run, and where a run fails.
    """

    name = "openvino"

    def __init__(
        self,
        model: str | Path,
        threads: int | None = None,
        limit_s: float | None = None,
        *,
        device: str = "cpu",
        precision: str = FP32,
    ) -> None:
        self.name = self.name if device == "cpu" else f"{self.name}:{device}"
        self.limit_s, self._told, self.device, self._hint = limit_s, str(model), device.upper(), _HINTS[precision]
        self.threads = check_threads(threads)
        self.versions = {"openvino": ov.__version__.partition("-")[0]}
        self._core = ov.Core()
        try:
            self._model = self._core.read_model(str(model))
            self.inputs = [(_name(port), _shape(port)) for port in self._model.inputs]
            self.outputs = [_name(port) for port in self._model.outputs]
        except Exception as error:  # OpenVINO's exceptions have no common base
            raise DownresError(
                f"{self._told} is not a model that OpenVINO can run ({_reason(error)}): export it again."
            ) from error
        kinds = [port.element_type for port in self._model.inputs]
        self._takes = np.uint8 if kinds[:1] == [ov.Type.u8] else np.float32
        self._requests: dict[int, Any] = {}
        self.hints: dict[str, str] = {}

    def __call__(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """(b, c, h, w) float32, or uint8 pictures where the graph takes these → the outputs, in the graph's order."""
        batch = np.ascontiguousarray(batch, dtype=self._takes)
        try:
            request = self._request(batch.shape)
            if self.limit_s is None:
                found = request.infer({0: batch}, share_inputs=True)
            else:
                request.start_async({0: batch}, share_inputs=True)
                if not request.wait_for(int(1000 * self.limit_s * len(batch))):
                    request.cancel()
                    raise DownresError(
                        f"{self._told} gave no answer in {self.limit_s:g} s and was stopped: give it more time, or export it "
                        "again."
                    )
                found = request.results
        except DownresError:
            raise
        except Exception as error:
            raise DownresError(
                f"{self._told} cannot run on {list(batch.shape)} values ({_reason(error)}): export it again."
            ) from error
        return tuple(np.array(found[i]) for i in range(len(self.outputs)))

    def _request(self, shape: tuple[int, ...]) -> Any:
        if shape[0] not in self._requests:
            compiled = self.compiled(shape)
            self.hints = {
                "precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
                "device": ", ".join(compiled.get_property("EXECUTION_DEVICES")),
            }
            if self.hints["precision"] != self._hint:
                raise DownresError(
                    f"OpenVINO computes in {self.hints['precision']} here and not in {self._hint}: leave that precision out."
                )
            self._requests[shape[0]] = compiled.create_infer_request()
        return self._requests[shape[0]]

    def compiled(self, shape: tuple[int, ...], **more: Any) -> Any:
        """For inputs (b, c, h, w). more: properties of OpenVINO's."""
        fixed = self._model.clone()
        if self._takes is np.float32:  # pictures have many sizes
            fixed.reshape({0: list(shape)})
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._hint,
            "NUM_STREAMS": 1,
            **more,
        }
        if self.device == "CPU":
            options |= {"INFERENCE_NUM_THREADS": self.threads, "ENABLE_CPU_PINNING": False}
        return self._core.compile_model(fixed, self.device, options)


class OpenVinoEngine(Engine):
    """OpenVINO, on the CPU or on what of Intel's is there; 8 bits by NNCF."""

    name, file = "openvino", "model.xml"
    alone = """
import re, sys
import numpy as np
import openvino
file, threads, *shape = sys.argv[1:]
peak = lambda: re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
before = peak()
core, shape = openvino.Core(), tuple(map(int, shape))
model = core.read_model(file)
model.reshape({0: list(shape)})
options = {"INFERENCE_NUM_THREADS": int(threads), "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
core.compile_model(model, "CPU", options)(np.zeros(shape, np.float32))
print(before, peak())
"""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        have = ov.Core().available_devices
        if device.upper() not in have:
            names = ", ".join(name.lower() for name in have)
            raise DownresError(f"OpenVINO finds no {device} here, it has {names}: install the driver, or name another.")

    def why_not(self, precision: str) -> str:
        can = ov.Core().get_property(self.device.upper(), "OPTIMIZATION_CAPABILITIES")
        if precision.upper() in can:
            return ""
        return (
            f"OpenVINO says that the {self.device} has {', '.join(c.lower() for c in can if c[0] in 'FBI' and c[-1].isdigit())}"
        )

    def write(self, exported: Path, path: Path, precision: str) -> None:
        _save(_read(exported), path, compress=precision == FP16)

    def provider(self, precision: str) -> tuple[str, ...]:
        return self.device.upper(), _HINTS[precision]

    def quantize(
        self,
        exported: Path,
        path: Path,
        images: Batches,
        how: Quantization,
        head: np.ndarray | None,
        ranges: Path | None = None,
    ) -> None:
        from .nncf_int8 import quantized

        with quiet():
            model = _read(exported)
            by_weight = _by_weight(model)
            if unknown := set(how.kept) - by_weight.keys():
                raise QuantizationFailed(f"there is no layer {min(unknown)} in it")
            kept = {op for name in how.kept for op in by_weight[name]} | _from_head(model, head)
            made = quantized(model, images, kept, _is_transformer(model), how.ranges)
        _save(made, path)
        if not self.layers(path).quantized:
            raise QuantizationFailed("NNCF found no layer in it that it quantizes")

    def layers(self, file: Path) -> Layers:
        found: dict[bool, dict[str, int]] = {True: {}, False: {}}
        for op in _read(file).get_ops():
            if (kind := op.get_type_name()) in _LAYERS and _weight(op) is not None:
                in_8_bits = _is_quantized(op)
                found[in_8_bits][kind] = found[in_8_bits].get(kind, 0) + 1
        return Layers(found[True], found[False])

    def layer_names(self, exported: Path, head: np.ndarray | None) -> list[str]:
        model = _read(exported)
        left = _from_head(model, head)
        return [name for name, ops in _by_weight(model).items() if not left & set(ops)]

    def with_tensors(self, file: Path, tensors: Mapping[str, np.ndarray], path: Path) -> bool:
        model = _read(file)
        by_name = {plain_name(op.get_friendly_name()): op for op in model.get_ops() if op.get_type_name() == "Constant"}
        if not tensors.keys() <= by_name.keys():
            return False
        for name, values in tensors.items():
            old = by_name[name]
            if list(old.get_output_shape(0)) != list(values.shape):
                return False
            made = ov.op.Constant(np.ascontiguousarray(values))
            made.set_friendly_name(old.get_friendly_name())
            for taken in list(old.output(0).get_target_inputs()):
                taken.replace_source_output(made.output(0))
        _save(model, path)
        return True

    def put_in_front(self, front: Any, file: Path, path: Path) -> None:
        before, model = ov.Core().read_model(front.SerializeToString()), _read(file)
        given = before.output(0).get_node().input_value(0)
        for taken in list(model.input(0).get_target_inputs()):
            taken.replace_source_output(given)
        _save(ov.Model(model.get_results(), before.get_parameters()), path)

    def up_to(self, file: Path, tensor: str, path: Path) -> None:
        model = _read(file)
        given = next(out for op in model.get_ops() for out in op.outputs() if tensor in out.get_names())
        _save(ov.Model([given], model.get_parameters()), path)

    def load(
        self,
        file: Path,
        threads: int | None = None,
        limit_s: float | None = None,
        *,
        precision: str = FP32,
        spread: bool = False,
    ) -> OpenVino:
        return OpenVino(file, threads, limit_s, device=self.device, precision=precision)

    def files(self, file: Path) -> list[Path]:
        return [file, file.with_suffix(".bin")]

    def executed(self, file: Path, batch: np.ndarray, threads: int | None = None) -> list[Operator]:
        compiled = self.load(file, threads, precision=INT8).compiled(batch.shape, PERF_COUNT=True)
        request = compiled.create_infer_request()
        for _ in range(PROFILED + 1):
            request.infer({0: batch}, share_inputs=True)
        found = []
        for op in compiled.get_runtime_model().get_ordered_ops():
            told = op.get_rt_info()
            kind, us = str(told["layerType"].value), str(told["execTimeMcs"].value)
            if kind not in _NO_WORK:
                takes = tuple(value.get_node().get_friendly_name() for value in op.input_values())
                in_8_bits = str(told["runtimePrecision"].value) in ("i8", "u8")
                runs = us.isdigit()  # others are views
                converts = kind in _CONVERSIONS or not runs
                found.append(Operator(op.get_friendly_name(), kind, takes, in_8_bits, converts, float(us) if runs else 0.0))
        return found


ENGINE = OpenVinoEngine


def _read(file: Path) -> Any:
    try:
        return ov.Core().read_model(str(file))
    except Exception as error:
        raise DownresError(f"{file} is not a model that OpenVINO can read ({_reason(error)}): export it again.") from error


def _save(model: Any, path: Path, compress: bool = False) -> None:
    """The numbers first and then what names them, so that a file of the name is whole."""
    partial = path.with_name(f"partial-{path.stem}.xml")
    try:
        ov.save_model(model, str(partial), compress_to_fp16=compress)
        partial.with_suffix(".bin").replace(path.with_suffix(".bin"))
        partial.replace(path)
    finally:
        for left in (partial, partial.with_suffix(".bin")):
            left.unlink(missing_ok=True)


def _name(port: Any) -> str:
    return str(port.get_any_name()) if port.get_names() else ""


def _shape(port: Any) -> list[Any]:
    """As ONNX Runtime has it: a free side by a name."""
    return [d.get_length() if d.is_static else "batch" for d in port.get_partial_shape()]


def _reason(error: Exception) -> str:
    """OpenVINO's errors open with the place in its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception from")]
    return (lines[-1] if lines else type(error).__name__)[:200]


def _by_weight(model: Any) -> dict[str, list[str]]:
    """Name of a weight → the operators that it is the weight of, in the order in which they run."""
    found: dict[str, list[str]] = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() in _LAYERS and (weight := _weight(op)) is not None:
            found.setdefault(plain_name(weight.get_friendly_name()), []).append(op.get_friendly_name())
    return found


def _weight(op: Any) -> Any:
    """The constant that a layer multiplies by, whatever stands between them; None where it multiplies two activations."""
    for i in (1, 0):
        node = op.input_value(i).get_node()
        while node.get_type_name() in ("FakeQuantize", "Convert", "Subtract", "Multiply", "Reshape", "Transpose"):
            if node.get_type_name() == "Reshape" and op.get_type_name() == "MatMul" and i == 0:
                break
            node = node.input_value(0).get_node()
        if node.get_type_name() == "Constant":
            return node
    return None


def _is_quantized(op: Any) -> bool:
    return any(op.input_value(i).get_node().get_type_name() == "FakeQuantize" for i in (0, 1)) and all(
        _in_8_bits(op.input_value(i).get_node()) for i in (0, 1)
    )


def _in_8_bits(node: Any) -> bool:
    """Whether what goes into a layer was brought to 8 bits: an activation just before, a weight when it was stored."""
    while node.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Squeeze", "Unsqueeze"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "FakeQuantize" or (
        node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in ("i8", "u8")
    )


def _is_transformer(model: Any) -> bool:
    """Whether two activations are multiplied and a softmax is taken: attention."""
    kinds = [op.get_type_name() for op in model.get_ops()]
    if "ScaledDotProductAttention" in kinds:
        return True
    products = any(op.get_type_name() == "MatMul" and _weight(op) is None for op in model.get_ops())
    return products and any(kind.startswith("Softmax") for kind in kinds)


def _from_head(model: Any, head: np.ndarray | None) -> set[str]:
    """Names of the layer that has these weights and of all that comes after it; nothing where no layer has them."""
    if head is None:
        return set()
    roots = []
    edges: dict[str, list[str]] = {}
    for op in model.get_ops():
        edges[op.get_friendly_name()] = [
            i.get_node().get_friendly_name() for out in op.outputs() for i in out.get_target_inputs()
        ]
        if op.get_type_name() == "MatMul" and (w := _weight(op)) is not None:
            if is_head(w.data, head):
                roots.append(op.get_friendly_name())
    return after(roots, edges)
