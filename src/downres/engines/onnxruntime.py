"""Export to ONNX and run there."""

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
import onnx.helper
import onnx.numpy_helper
import onnxruntime
import torch
from torch import nn

from ..copying import copied, single
from ..errors import NO_SPACE, DownresError, first_line, shown
from ..lazy import no_collector
from ..parse import FP16, FP32, INT8
from . import check_threads
from .engine import BY_NNCF, LEAST_OPSET, PROFILED, RANGES, Batches, Engine, Layers, Operator, Quantization, plain_name, quiet
from .fuse import fused, noise
from .shared import whole
from .torch import TorchRuntime, plain_attention, uncompiled

INPUT_NAME = "input"
_PROVIDERS = {
    "cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider", "directml": "DmlExecutionProvider", "rocm": "ROCMExecutionProvider",
    "openvino": "OpenVINOExecutionProvider", "migraphx": "MIGraphXExecutionProvider", "qnn": "QNNExecutionProvider",
}  # fmt: skip
"""Device → ONNX Runtime's name of what runs there."""


class OnnxRuntime:
    """One ONNX model in ONNX Runtime, deterministic where it runs on the CPU.

    device: 'cpu', 'cuda', 'tensorrt', 'coreml', 'directml', …; what cannot run there runs on the CPU, but where nothing can the
    runtime is refused. model: a path or the bytes of a file. threads: of the session; None takes all available cores. limit_s:
    seconds that one image may take, None for ever; it is looked at between the graph's nodes. spread: the images of a batch
    are spread over the threads, each image on one, in place of every operator: the same answers, as fast where nothing else
    runs, and faster where the cores have other work (threads of one operator wait for each other); no time of a single image.
    inputs: (name, shape) of each, a free side by its name; outputs: their names.
    Raises DownresError when the content is not an ONNX model that ONNX Runtime can run, and where a run fails.
    """

    name = "onnxruntime"

    def __init__(
        self,
        model: str | Path | bytes,
        threads: int | None = None,
        limit_s: float | None = None,
        *,
        spread: bool = False,
        device: str = "cpu",
    ) -> None:
        spread = spread and device == "cpu"
        self.name = self.name if device == "cpu" else f"{self.name}:{device}"
        self.limit_s, self._told = limit_s, "This content" if isinstance(model, bytes) else str(model)
        self.threads = check_threads(threads)
        self.versions = {"onnxruntime": onnxruntime.__version__}
        options = _options(1 if spread else self.threads)
        source = model if isinstance(model, bytes) else str(model)
        if isinstance(source, str) and shown(source) != source:  # it takes names in UTF-8 alone
            source = whole(Path(source))
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=_providers(device))
            _refuse_fallback(self._session.get_providers(), device)
        except DownresError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            reason = first_line(error).rpartition(" : ")[2]
            raise DownresError(f"{self._told} is not an ONNX model that can run ({reason}): export it again.") from error
        self.inputs = [(one.name, list(one.shape)) for one in self._session.get_inputs()]
        self.outputs = [one.name for one in self._session.get_outputs()]
        kinds = [one.type for one in self._session.get_inputs()]
        self._takes = np.uint8 if kinds[:1] == ["tensor(uint8)"] else np.float32
        self._pool = ThreadPoolExecutor(self.threads) if spread and self.threads > 1 else None

    def __call__(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """(b, c, h, w) float32, or uint8 pictures where the graph takes these → the outputs, in the graph's order."""
        if self._pool is None or len(batch) < 2:
            return self._run(batch)
        parts = self._pool.map(self._run, np.array_split(batch, min(self.threads, len(batch))))
        return tuple(np.concatenate(outputs) for outputs in zip(*parts, strict=True))

    def _run(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        given = {self.inputs[0][0]: np.ascontiguousarray(batch, dtype=self._takes)}
        try:
            return tuple(
                self._session.run(None, given) if self.limit_s is None else self._in_time(given, self.limit_s * len(batch))
            )
        except DownresError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            reason = first_line(error).rpartition(" : ")[2]
            raise DownresError(f"{self._told} cannot run on {list(batch.shape)} values ({reason}): export it again.") from error

    def _in_time(self, given: dict[str, np.ndarray], limit_s: float) -> list[np.ndarray]:
        options = onnxruntime.RunOptions()
        late = threading.Timer(limit_s, setattr, (options, "terminate", True))
        late.daemon = True
        late.start()
        try:
            return self._session.run(None, given, options)  # type: ignore[no-any-return]
        except Exception:
            if not options.terminate:
                raise
            raise DownresError(
                f"{self._told} gave no answer in {limit_s:g} s and was stopped: give it more time, or export it again."
            ) from None
        finally:
            late.cancel()


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised, and said in a sentence
    options.use_deterministic_compute = True
    # An idle session's threads would otherwise keep spinning for a while and slow down whoever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _reads_8_bits(inputs: list[dict[str, list[int]]]) -> bool:
    """Whether one of the inputs that a profile names, by type and shape, is a tensor of 8 bits, and no zero point."""
    return any(shape and kind in ("int8", "uint8") for one in inputs for kind, shape in one.items())


def _providers(device: str) -> list[str]:
    """What a session is asked for; DownresError where this onnxruntime has it not."""
    have = onnxruntime.get_available_providers()
    if (wanted := _PROVIDERS.get(device)) is None or wanted not in have:
        names = ", ".join(name for name, provider in _PROVIDERS.items() if provider in have)
        raise DownresError(f"This onnxruntime has no {device}, it has {names}: install the build that has it, or name another.")
    return list(dict.fromkeys([wanted, _PROVIDERS["cpu"]]))


def _refuse_fallback(got: list[str], device: str) -> None:
    """ONNX Runtime takes the CPU without a word where a provider does not start."""
    if _PROVIDERS[device] not in got:
        raise DownresError(
            f"ONNX Runtime fell back from {device} to the CPU, its numbers would be the CPU's: check the driver and the "
            "libraries of that device, or leave the device out."
        )


class OnnxEngine(Engine):
    """ONNX Runtime: on the CPU float32 and 8 bits; on devices that have it half precision."""

    name, file = "onnxruntime", "model.onnx"
    alone = """
import re, sys
import numpy as np
import onnxruntime
file, threads, *shape = sys.argv[1:]
peak = lambda: re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
session.run(None, {session.get_inputs()[0].name: np.zeros(tuple(map(int, shape)), np.float32)})
print(before, peak())
"""

    @property
    def ranges(self) -> tuple[str, ...]:
        return (*RANGES, BY_NNCF) if importlib.util.find_spec("nncf") else RANGES

    def why_not(self, precision: str) -> str:
        if precision in (FP32, INT8):
            return ""
        if self.device == "cpu":
            return f"on the CPU it has no {precision} kernels and would compute in float32 with casts"
        return "" if precision == FP16 else f"downres writes no {precision} ONNX files"

    def write(self, exported: Path, path: Path, precision: str) -> None:
        if precision == FP32:
            shutil.copyfile(exported, path)
            return
        self.refuse(precision)
        try:
            from onnxconverter_common import float16
        except ImportError:
            raise DownresError("fp16 ONNX files need onnxconverter-common: pip install onnxconverter-common.") from None
        onnx.save(float16.convert_float_to_float16(onnx.load(exported), keep_io_types=True), path)

    def provider(self, precision: str) -> tuple[str, ...]:
        return (_PROVIDERS[self.device],)

    def quantize(
        self,
        exported: Path,
        path: Path,
        images: Batches,
        how: Quantization,
        head: np.ndarray | None,
        ranges: Path | None = None,
    ) -> None:
        from .onnx_int8 import quantize_onnx

        quantize_onnx(exported, path, images, how, head, ranges)

    def layers(self, file: Path) -> Layers:
        from .onnx_int8 import layers_of

        return layers_of(file)

    def layer_names(self, exported: Path, head: np.ndarray | None) -> list[str]:
        from .onnx_int8 import layer_names

        return layer_names(exported, head)

    def executed(self, file: Path, batch: np.ndarray, threads: int | None = None) -> list[Operator]:
        named = onnx.load(file)
        for i, node in enumerate(named.graph.node):
            node.name = node.name or f"unnamed {i}"  # the profile knows operators by their names alone
        with tempfile.TemporaryDirectory(prefix="downres-") as place:
            options = _options(check_threads(threads))
            options.optimized_model_filepath = str(Path(place) / "optimized.onnx")
            options.enable_profiling, options.profile_file_prefix = True, str(Path(place) / "profile")
            session = onnxruntime.InferenceSession(named.SerializeToString(), options, providers=_providers(self.device))
            for _ in range(PROFILED + 1):
                session.run(None, {session.get_inputs()[0].name: batch})
            events = json.loads(Path(session.end_profiling()).read_text())
            graph = onnx.load(Path(place) / "optimized.onnx").graph
        seen: dict[str, list[dict]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                seen.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event)
        made_by = {out: node.name for node in graph.node for out in node.output}
        found = []
        for node in graph.node:
            runs = seen.get(node.name, [])[-PROFILED:]
            takes = tuple(made_by[name] for name in node.input if name in made_by)
            converts = node.op_type in ("QuantizeLinear", "DequantizeLinear") or not runs
            reads = node.op_type != "QuantizeLinear" and runs  # whose zero points are in 8 bits too
            in_8_bits = bool(reads) and _reads_8_bits(runs[-1]["args"].get("input_type_shape", []))
            us = float(np.median([event["dur"] for event in runs])) if runs else 0.0
            found.append(Operator(node.name, node.op_type, takes, in_8_bits, converts, us))
        return found

    def with_tensors(self, file: Path, tensors: Mapping[str, np.ndarray], path: Path) -> bool:
        graph = onnx.load(file)
        by_name = {plain_name(initializer.name): initializer for initializer in graph.graph.initializer}
        if not tensors.keys() <= by_name.keys():
            return False
        for name, values in tensors.items():
            target = by_name[name]
            target.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values), target.name))
        path.write_bytes(graph.SerializeToString())
        return True

    def put_in_front(self, front: onnx.ModelProto, file: Path, path: Path) -> None:
        model, before = onnx.load(file), onnx.ModelProto()
        before.CopyFrom(front)
        # The operators of what stands in front mean the same in every later opset.
        own = {one.domain: one.version for one in model.opset_import}
        before.ir_version, before.opset_import[0].version = model.ir_version, max(LEAST_OPSET, own.get("", 0))
        joint = [(before.graph.output[0].name, model.graph.input[0].name)]
        path.write_bytes(onnx.compose.merge_models(before, model, io_map=joint).SerializeToString())

    def up_to(self, file: Path, tensor: str, path: Path) -> None:
        model = onnx.load(file)
        del model.graph.output[:]
        model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
        path.write_bytes(model.SerializeToString())

    def load(
        self,
        file: Path,
        threads: int | None = None,
        limit_s: float | None = None,
        *,
        precision: str = FP32,
        spread: bool = False,
    ) -> OnnxRuntime:
        return OnnxRuntime(file, threads, limit_s, spread=spread, device=self.device)


ENGINE = OnnxEngine


class NotExported(DownresError):
    """A network that cannot be written as ONNX; why: the operator or the line that is in the way."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"The model could not be exported to ONNX: {why}; `runtime='torch'` measures without.")


def export_onnx(
    model: nn.Module,
    input_size: tuple[int, int, int],
    path: str | Path,
    output_names: Sequence[str] = ("logits",),
    *,
    own_batchnorm: bool = False,
) -> Path:
    """Writes one ONNX file (weights inside) with a free batch dimension and an input named `input`; returns its path.

    input_size: (channels, height, width). The model is copied, put in eval mode on the CPU and not changed; branches
    that are for training alone are put together in the copy (`fused`). own_batchnorm: BatchNorms stay operators of their own,
    which ONNX Runtime puts into the convolutions before them when it loads the file; else they are in there already.
    Raises NotExported when the model cannot be exported, or not with a free batch.
    """
    path = Path(path)
    channels, height, width = input_size
    example = torch.zeros(2, channels, height, width)  # two: torch.export takes a dimension of one for a constant
    try:
        plain = single(copied(model)).requires_grad_(False)
        apart = _batchnorm_apart() if own_batchnorm else contextlib.nullcontext()
        with quiet(), plain_attention(), uncompiled(), _one_table(), no_collector(), apart:
            plain = fused(plain, noise((1, *input_size), example))
            free_batch = ({0: torch.export.Dim.DYNAMIC},)
            program = torch.export.export(plain, (example,), dynamic_shapes=free_batch, strict=False)
            torch.onnx.export(
                program,
                f=path,
                input_names=[INPUT_NAME],
                output_names=list(output_names),
                dynamo=True,
                optimize=True,  # graphs are 2 to 4 times slower without
                external_data=False,
                verbose=False,
            )
        _check_batch_is_free(path, example.numpy()[:1])
    except Exception as error:
        if any(getattr(one, "errno", None) in NO_SPACE or "No space left" in str(one) for one in _chain(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error  # which is no fault of the network
        raise NotExported(_why(error)) from error
    return path


def resize_onnx(source: Path, model: nn.Module, input_size: tuple[int, int, int], path: Path) -> bool:
    """Writes the graph of `source`, exported from `model` at another size, for `input_size`; whether that is the same network.

    An export takes seconds and this a tenth of one, and the graph is the one that an export would give. Sizes that the
    exporter took for constants (padding that depends on the size, a map resized to a neighbour's) fail or change the
    answers: the file is kept only where ONNX Runtime gives on noise what `model` gives, within rounding.
    """
    graph = onnx.load(source)
    for axis, value in zip(graph.graph.input[0].type.tensor_type.shape.dim[2:], input_size[1:], strict=True):
        axis.dim_value = value
    del graph.graph.value_info[:]
    for output in graph.graph.output:
        output.type.tensor_type.ClearField("shape")
    image = np.random.default_rng(0).standard_normal((2, *input_size), dtype=np.float32)
    try:
        content = onnx.shape_inference.infer_shapes(graph, strict_mode=True).SerializeToString()
        answers = OnnxRuntime(content)(image)
        expected = TorchRuntime(model)(image)
    except Exception:  # whatever a graph of another size fails with: it is exported anew
        return False
    if not all(_equal(a, b) for a, b in zip(answers, expected, strict=True)):
        return False
    path.write_bytes(content)
    return True


def alone_onnx(
    source: Path,
    model: nn.Module,
    input_size: tuple[int, int, int],
    path: Path,
    name: str,
    weight: np.ndarray,
    bias: np.ndarray,
) -> bool:
    """Writes the graph of `source`, whose first output is that of its last linear layer beside what that layer reads, with this
    layer in its place and that output alone, called `name`; whether it is `model`, to be seen as in `resize_onnx`.

    weight: (K, F), bias: (K,). An export takes seconds, and would give the same graph.
    """
    made = onnx.load(source)
    graph = made.graph
    by = {output: node for node in graph.node for output in node.output}
    first = graph.output[0]
    part = by.get(first.name)
    both = by.get(part.input[0]) if part is not None and part.op_type == "Slice" else None
    layer = by.get(both.input[0]) if both is not None and both.op_type == "Concat" else None
    if layer is None or layer.op_type != "Gemm" or {a.name: a.i for a in layer.attribute}.get("transB") != 1:
        return False  # something comes behind that layer
    if not layer.input[1].endswith(".linear.weight"):
        return False
    last = [node for node in graph.node if both is not None and (node is both or both.output[0] in node.input)]
    for node in last:
        graph.node.remove(node)
    own = [layer.input[1].removesuffix("linear.weight") + kind for kind in ("weight", "bias")]  # as an export names them
    layer.input[1:] = own
    layer.output[0] = name
    graph.initializer.extend(onnx.numpy_helper.from_array(value, of) for value, of in zip((weight, bias), own, strict=True))
    used = {value for node in graph.node for value in node.input}
    for initializer in [one for one in graph.initializer if one.name not in used]:
        graph.initializer.remove(initializer)
    kept = {value for node in graph.node for value in node.output} - {name}
    for info in [one for one in graph.value_info if one.name not in kept]:
        graph.value_info.remove(info)
    first.name = name
    del graph.output[1:]
    image = np.random.default_rng(0).standard_normal((2, *input_size), dtype=np.float32)
    try:
        content = made.SerializeToString()
        # What is added up in an answer may nearly cancel out: its rounding is that of the features, times their weights.
        most = np.maximum(np.abs(OnnxRuntime(source)(image)[-1]).max() * np.abs(weight).sum(1), np.abs(bias))
        answers, expected = OnnxRuntime(content)(image), TorchRuntime(model)(image)
        same = all(_equal(a, b, most) for a, b in zip(answers, expected, strict=True))
    except Exception:  # whatever it fails with: it is exported anew
        return False
    if same:
        path.write_bytes(content)
    return same


def _equal(a: np.ndarray, b: np.ndarray, of: np.ndarray | None = None) -> bool:
    """Whether two answers are the same but for rounding (1e-5 of the largest; a padding that differs moves a tenth).

    of: the largest that each value of the last axis may be made of, in place of the answers' own largest.
    """
    most = np.abs(b).max() if of is None else np.abs(of)
    return a.shape == b.shape and bool((np.abs(a - b) <= 1e-5 * most).all())


def _check_batch_is_free(path: Path, image: np.ndarray) -> None:
    """Runs (1, c, h, w) and three of them; a graph in which the batch is a constant fails or keeps its own size."""
    runtime = OnnxRuntime(path)
    for size in (1, 3):
        outputs = runtime(np.repeat(image, size, axis=0))
        if any(o.shape[:1] != (size,) for o in outputs):
            raise ValueError(f"a batch of {size} gives outputs of shape {[o.shape for o in outputs]}")


@contextlib.contextmanager
def _one_table() -> Iterator[None]:
    """torch reads how operators are written in ONNX anew for every export, half of what a small network's takes: once is
    enough, as nothing but translations of one's own, of which downres has none, changes that table. It also lists all of its
    own operators once for each library that has some, twice an export: once an export is enough.
    """
    try:
        from torch._export import utils
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        before, listing = vars(ONNXRegistry)["from_torchlib"], utils._materialize_cpp_cia_ops
    except (ImportError, KeyError, AttributeError):  # another torch, which does it otherwise
        yield
        return
    make = ONNXRegistry.from_torchlib

    def once(*version: int, **named: int) -> Any:
        key = (*version, *named.values())
        if key not in _TABLES:
            _TABLES[key] = make(*version, **named)
        return _TABLES[key]

    listed = cache(listing)
    ONNXRegistry.from_torchlib = staticmethod(once)  # type: ignore[method-assign, assignment]
    utils._materialize_cpp_cia_ops = listed  # type: ignore[assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = before  # type: ignore[method-assign]
        utils._materialize_cpp_cia_ops = listing


_TABLES: dict[tuple[int, ...], Any] = {}


@contextlib.contextmanager
def _batchnorm_apart() -> Iterator[None]:
    """The exporter's optimizer without its rules that put a BatchNorm into the convolution before it, which would make that
    another tensor wherever the BatchNorm is another. Of another onnxscript, which has them elsewhere, they stay: the file is
    right, and larger where it shares its tensors.
    """
    from onnxscript import rewriter

    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    folding = getattr(getattr(rewriter, "_fuse_batchnorm", None), "rules", ())
    if rules is None:
        yield
        return
    out = {id(rule) for rule in folding}
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if id(rule) not in out)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules


def _chain(error: BaseException) -> list[BaseException]:
    """An error, what it was raised from, and so on down."""
    found = [error]
    while (below := found[-1].__cause__ or found[-1].__context__) is not None:
        found.append(below)
    return found


def _why(error: BaseException) -> str:
    """The operator that ONNX lacks, the line of the network that cannot be traced, or what the exporter found at the bottom."""
    *_, deepest = errors = _chain(error)
    chain = "\n".join(map(str, errors))
    if lacking := re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", chain):
        return f"ONNX has no operator for {lacking[1].replace('.', '::', 1)}"
    raised = [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(deepest.__traceback__)]
    own = [line for line in re.findall(r'File "([^"]+)", line (\d+)', chain) + raised if not _LIBRARY.search(line[0])]
    where = f" (at {Path(own[-1][0]).name}, line {own[-1][1]})" if own else ""
    if "DataDependent" in type(deepest).__name__:
        return "what it computes depends on the values of a tensor" + where
    if re.search(r"Constraints violated.*size\(\)\[0\]", chain):
        return "the number of images is a constant in it" + where
    reason = first_line(deepest)
    return (f"{type(deepest).__name__} {reason}" if isinstance(deepest, LookupError) else reason) + where


_LIBRARY = re.compile(r"[/\\](?:torch|onnxscript|downres|contextlib\.py)(?:[/\\]|$)")
