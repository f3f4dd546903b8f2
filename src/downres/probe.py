"""One forward pass that computes nothing: what a model executes at an input size, without touching the model."""

import enum
import functools
import inspect
import logging
import math
import operator
import sys
import traceback
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .copying import children, copied, first_float, is_lazy, modules, named_modules, tensors_of, unwrapped
from .engines.torch import plain_attention, uncompiled
from .errors import DownresError, first_line
from .fakes import Fakes, Known
from .lazy import no_collector
from .parse import MAX_RESOLUTION

Seen = TypeVar("Seen")
Watch = Callable[[nn.Module, Tensor], AbstractContextManager[Seen]]
"""Given the copy that will run and its input, a context that is open during the forward pass; what it yields is returned."""

Path = tuple[Any, ...]
Outputs = dict[Path, Tensor]
"""Where in what a network returns → the tensor there, without numbers."""

ROOMY_STEP = 64
"""`total_stride` runs at multiples of this many pixels, so that the usual strides divide them."""

MOST_REAL = 3 * 4096 * 4096
"""Numbers in an input that a copy with numbers is run on at most: a stem of 64 channels makes 4 GB of these."""


def fake_run(model: nn.Module, input_size: tuple[int, ...], watch: Watch[Seen], several: bool = False) -> Seen:
    """Runs a copy of the model once, in eval mode and without gradients, and returns what `watch` saw.

    The copy holds fake tensors (shapes, no numbers, no memory), so that neither arithmetic nor the original's weights,
    flags, hooks or cached attributes are touched; the original may have no numbers either (on the meta device). What functions
    of its modules keep in an `lru_cache` is forgotten. A model that looks at its numbers cannot run so: a real copy then
    runs on zeros, watched in the same way, unless the input is so large that this would take gigabytes.

    input_size: (channels, height, width) for a batch of one, or (batch, channels, height, width).
    several: a model that asks for several inputs gets the same image as each of them.
    Raises DownresError when the size is neither, `DoesNotRun` when the model does not run at it.
    """
    return FakeCopy(model, several).run(input_size, watch)


class DoesNotRun(DownresError):
    """A model that fails at an input size. reason: the module that failed and what it said, to go into another sentence."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class FakeCopy:
    """What `fake_run` runs; made once and run at many sizes, as long as no run leaves a trace in the copy."""

    def __init__(self, model: nn.Module, several: bool = False, again: bool = False, known: Known | None = None) -> None:
        """again: it is run more than once. known: shared with copies of other networks."""
        self.model, self.several, self.again, self.known = model, several, again, known or Known()
        self._copy: nn.Module | None = None
        self._before: list[Any] | None = None

    def run(self, input_size: tuple[int, ...], watch: Watch[Seen]) -> Seen:
        """As `fake_run`; what `watch` registers in the copy it takes away again, where the copy is run more than once."""
        size = batched(input_size)
        self.model = materialised(self.model, size)
        try:
            with no_collector(), _empty_caches(self.model):
                if self._copy is None:
                    self._copy, self._mode = self._faked()
                    self._before = _state(self._copy) if self.again else None
                with self._mode, _unlogged():
                    seen = _forward(self._copy, size, watch, self.several)
                if self._before is None or not _is_same(self._before, _state(self._copy)):
                    self._copy = None
                return seen
        except Exception as error:  # any reason: the real run below succeeds, or says better what is wrong
            first, tried, self._copy = error, self._copy, None
        if math.prod(size) > MOST_REAL:
            raise _does_not_run(tried or self.model, size, first) from first
        real = copied(self.model)
        try:
            return _forward(real, size, watch, self.several)
        except DownresError:
            raise
        except Exception as error:
            raise _does_not_run(real, size, error) from error

    def _faked(self) -> tuple[nn.Module, Fakes]:
        fakes = Fakes(self.known)
        known = {id(t): _faked(t, fakes) for t in tensors_of(self.model) if _is_plain(t) or t.device.type == "meta"}
        with FakeCopyMode(fakes):
            return nn.Module.eval(copied(self.model, known)), fakes


_NEVER_CHANGES = frozenset(
    (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.Size, torch.device, torch.layout)
    + (torch.memory_format, types.FunctionType, types.BuiltinFunctionType, FakeTensor, nn.Parameter, Tensor)
)
"""Tensors of a copy have no numbers; functions and classes of Python are the same in every copy."""


def _state(model: nn.Module) -> list[Any] | None:
    """All that a run may change in a copy, in order, each thing itself; None where something could change unseen."""
    found: list[Any] = []
    seen: set[int] = set()
    stack: list[Any] = [model]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kind: Any = type(value)
        inside: Collection[Any]
        if kind in (dict, OrderedDict):
            inside = (*value, *value.values())
        elif kind in (list, tuple, set, frozenset):
            inside = value
        elif kind is functools.partial:
            inside = value.func, value.args, value.keywords
        elif kind is types.MethodType:
            inside = (value.__self__,)
        elif isinstance(value, enum.Enum):
            inside = ()
        elif _is_all_attributes(kind):
            inside = vars(value).values() if hasattr(value, "__dict__") else ()
        else:
            return None
        found.append(len(inside))
        found += inside
        stack += [part for part in inside if type(part) not in _NEVER_CHANGES]
    return found


@functools.cache
def _is_all_attributes(kind: type) -> bool:
    """Whether an object has nothing but its `vars`."""
    return kind.__new__ is object.__new__ and not any(vars(base).get("__slots__") for base in kind.__mro__)


def _is_same(before: list[Any], after: list[Any] | None) -> bool:
    return after is not None and len(before) == len(after) and all(map(operator.is_, before, after))


def _does_not_run(model: nn.Module, size: tuple[int, ...], error: Exception) -> DoesNotRun:
    reason, shape = failed(model, error), "x".join(str(n) for n in size)
    kind, then = type(model).__name__, "give a size that it accepts"
    if takes_clips(model, size, reason):
        then = CLIPS
    elif "channels" in reason and (takes := _stated_channels(model)) not in (None, size[1]):
        then = f"its first convolution takes {takes} channel{'s' * (takes > 1)}, give {(takes, *size[2:])}"
    elif len(asked := required_inputs(model)) > 1:
        then = f"it takes {', '.join(p.name for p in asked)}, give a network that takes one image and fills in the rest"
    return DoesNotRun(f"{kind} does not run on an input of {shape} ({reason}): {then}.", reason)


def failed(model: nn.Module, error: BaseException) -> str:
    """What was raised while the model ran, in one line that opens with the module inside that failed: `head.fc (Linear): …`."""
    names = {id(module): name for name, module in named_modules(model)}
    where = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):  # from the outermost in
        code = frame.f_code
        own = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(own, nn.Module) and id(own) in names:
            where = f"{names[id(own)]} ({type(own).__name__}): " if names[id(own)] else ""
    return where + said(error)


def said(error: BaseException) -> str:
    """The first line of what was raised; of an assertion without words, the line of code that made it."""
    if str(error).strip():
        return first_line(error)
    code = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.line and "/torch/" not in frame.filename]
    return code[-1] if code else type(error).__name__


def materialised(model: nn.Module, input_size: tuple[int, ...] | None = None) -> nn.Module:
    """The model itself; of one with lazy layers a copy that has run once, on zeros: these layers now have (random) weights.

    input_size: as for `fake_run`; None: the model's own.
    """
    if not isinstance(model, nn.Module) or not is_lazy(model):
        return model
    made = copied(model)
    size = batched(input_size or input_size_of(made))
    try:
        with torch.random.fork_rng(devices=[]):
            _forward(made, size, lambda _model, _x: nullcontext())
    except Exception as error:
        text = first_line(error)
        raise DownresError(
            f"The lazy layers of {type(made).__name__} have no weights, and it does not run at {'x'.join(map(str, size))} to "
            f"get them ({text}): run it once on an image of its own size first."
        ) from error
    for module, original in zip(modules(made), modules(unwrapped(model)), strict=True):
        module.training = original.training
    return made


def batched(input_size: tuple[int, ...]) -> tuple[int, ...]:
    """(batch, channels, height, width) of a size given with or without the batch; DownresError for anything else, and for more
    pixels than MAX_RESOLUTION squared: what a network makes real by its size, such as positions, would fill the memory.
    """
    size = tuple(input_size)
    if len(size) not in (3, 4) or not all(isinstance(n, int) and n > 0 for n in size):
        raise DownresError(f"An input size is (channels, height, width), all above 0, {size} is not: give (3, 224, 224).")
    if math.prod(size[-2:]) > MAX_RESOLUTION**2:
        raise DownresError(
            f"An input has at most {MAX_RESOLUTION}x{MAX_RESOLUTION} pixels, {size[-2]}x{size[-1]} are more: "
            "give for example (3, 224, 224)."
        )
    return size if len(size) == 4 else (1, *size)


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter, FakeTensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.dim() > 0
    )


def _faked(tensor: Tensor, fakes: Fakes) -> FakeTensor:
    """What `fakes.from_tensor` makes of a plain tensor, twenty times faster: deepcopy takes these instead of copying.

    A network on the meta device is measured as one on a CPU.
    """
    shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    made = fakes.like(shape, torch.device("cpu") if tensor.device.type == "meta" else tensor.device)
    made.requires_grad_(tensor.requires_grad)
    made._is_param = isinstance(tensor, nn.Parameter)
    return made


@contextmanager
def _empty_caches(model: nn.Module) -> Iterator[None]:
    """What functions keep from one call to the next (tables of positions, in transformers) is real before and after."""
    kinds = {kind for module in modules(model) for kind in type(module).__mro__}
    found = {cached for name in {kind.__module__ for kind in kinds} for cached in _cached_functions(name)}
    for cached in found:
        cached.cache_clear()
    try:
        yield
    finally:
        for cached in found:
            cached.cache_clear()


@functools.cache
def _cached_functions(name: str) -> tuple[Any, ...]:
    """Functions with an `lru_cache` in a Python module and its classes, also behind a decorator. None of PyTorch's own."""
    if name.partition(".")[0] in ("torch", "builtins") or name not in sys.modules:
        return ()
    found = list(vars(sys.modules[name]).values())
    found += [value for kind in found if isinstance(kind, type) and kind.__module__ == name for value in vars(kind).values()]
    found = [value.__func__ if isinstance(value, (staticmethod, classmethod)) else value for value in found]
    cells = [cell for value in found if inspect.isfunction(value) for cell in value.__closure__ or ()]
    found += [value for cell in cells for value in _content(cell)]
    return tuple(value for value in found if isinstance(value, functools._lru_cache_wrapper))


def _content(cell: Any) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not filled yet
        return ()


@contextmanager
def _unlogged() -> Iterator[None]:
    """Fake tensors log a traceback for what they cannot do; the real run that follows says it in one line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _forward(model: nn.Module, size: tuple[int, ...], watch: Watch[Seen], several: bool = False) -> Seen:
    like = first_float(model)
    with torch.no_grad(), plain_attention(), uncompiled():
        x = torch.zeros(size, dtype=like.dtype, device=like.device)
        args, kwargs = given(model, x, several)
        with watch(nn.Module.eval(model), x) as seen:
            model(*args, **kwargs)
    return seen


def given(model: nn.Module, x: Tensor, several: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The arguments that hand the image to a model: by keyword where it takes no other."""
    asked = required_inputs(model)
    if asked and all(p.kind is p.KEYWORD_ONLY for p in asked) and (several or len(asked) == 1):
        return [], {p.name: x for p in asked}
    return [x] * (max(1, len(asked)) if several else 1), {}


def required_inputs(model: nn.Module) -> list[inspect.Parameter]:
    """Of `forward`, without those that have a default; of what only hands everything on to the one module inside, of that."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # of a kind that Python cannot look into
        return []
    variadic = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    inside = children(model)
    if parameters and len(variadic) == len(parameters) and len(inside) == 1:
        return required_inputs(inside[0])
    return [p for p in parameters if p not in variadic and p.default is p.empty]


def find_stem(model: nn.Module, input_size: tuple[int, ...]) -> str:
    """The dotted name of the first convolution executed.

    input_size: as for `fake_run`. Raises DownresError when no convolution module runs.
    """

    @contextmanager
    def watch(copied: nn.Module, x: Tensor) -> Iterator[list[str]]:
        executed: list[str] = []
        for name, module in named_modules(copied):
            if isinstance(module, _CONVOLUTIONS):
                module.register_forward_pre_hook(lambda _module, _inputs, name=name: executed.append(name))
        yield executed

    executed = fake_run(model, input_size, watch, several=True)
    if not executed:
        raise DownresError("No convolution was executed: name the module after which to resample with stem=….")
    return executed[0]


def total_stride(model: nn.Module, resolution: tuple[int, int], channels: int = 3) -> int:
    """How many input pixels, per side, share one position of the coarsest feature map: 32 for a ResNet, 16 for a ViT/16.

    It is the largest ratio of input growth to map growth, between two input sizes, over the outputs of the leaf modules.
    What does not grow with the input (global or adaptive pooling, squeeze-excitation, attention windows, channels) is no
    map, and what padding or rounding adds at the borders cancels out. A model of fixed size is compared with nothing at
    all, that is the ratio of input side to map side is taken, over maps larger than 1.

    resolution: (height, width) in pixels that the model takes.
    Raises DownresError when the model does not run at it.
    """
    roomy = tuple(math.ceil(side / ROOMY_STEP) * ROOMY_STEP for side in resolution)
    try:
        small = leaf_outputs(model, (channels, *roomy))
        large = leaf_outputs(model, (channels, *(2 * side for side in roomy)))
        growth, pairs = roomy, list(zip(small, large, strict=True))
    except (DownresError, ValueError):  # not at these sizes, or another path at each
        shapes = leaf_outputs(model, (channels, *resolution))
        growth, pairs = resolution, [((0, 0, 0, 0), shape) for shape in shapes]
    return max([1, *(ratio for pair in pairs for ratio in _ratios(growth, *pair))])


def _ratios(growth: tuple[int, ...], small: tuple[int, ...], large: tuple[int, ...]) -> Iterator[int]:
    """The stride of a map, for each of the layouts (batch, channels, h, w) and (batch, h, w, channels) that fits."""
    for first in (2, 1):
        (h_small, w_small), (h, w) = small[first : first + 2], large[first : first + 2]
        if min(h, w) > 1 and h > h_small and w > w_small:
            by_height, by_width = round(growth[0] / (h - h_small)), round(growth[1] / (w - w_small))
            if by_height == by_width:
                yield by_height


def leaf_outputs(model: nn.Module, input_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes of the four-dimensional outputs of the modules without children, in order of execution."""

    @contextmanager
    def watch(copied: nn.Module, x: Tensor) -> Iterator[list[tuple[int, ...]]]:
        shapes: list[tuple[int, ...]] = []

        def note(_module: nn.Module, _inputs: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and output.shape[0] == x.shape[0]:
                shapes.append(tuple(output.shape))

        for module in modules(copied):
            if not children(module):
                module.register_forward_hook(note)
        yield shapes

    return fake_run(model, input_size, watch)


def input_size_of(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that the model is used at: as its configuration says (timm's or transformers'), else 224×224;
    the channels are those of the first convolution, where it does not run with as many as are stated (three, if none are).
    """
    model = unwrapped(model)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if not size:
        config = getattr(model, "config", None)
        config = getattr(config, "vision_config", config)
        side = getattr(config, "image_size", None) or 224
        height, width = (side, side) if isinstance(side, int) else side
        size = getattr(config, "num_channels", 3), height, width
    return channels_of(model, tuple(size)), *size[1:]


def channels_of(model: nn.Module, size: tuple[int, ...] = (3, 224, 224)) -> int:
    """How many channels the model takes, for images of this size (channels, height, width), channels where nothing tells."""
    takes = _stated_channels(model)
    if takes in (None, size[0]) or is_lazy(model):
        return takes or size[0]
    first: list[int] = []

    def runs(channels: int) -> bool:
        @contextmanager
        def watch(copied: nn.Module, x: Tensor) -> Iterator[None]:
            for module in modules(copied):
                if isinstance(module, _CONVOLUTIONS):
                    module.register_forward_pre_hook(lambda module, _inputs: first.append(module.in_channels))
            yield None

        try:
            fake_run(model, (channels, *size[1:]), watch)
        except DownresError:
            return False
        return True

    if runs(size[0]):  # the network makes its channels itself (coordinates)
        return size[0]
    return next((n for n in dict.fromkeys([*first[:1], takes]) if runs(n)), takes)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


CLIPS = "its first convolution is a Conv3d, so it takes clips of several frames: give a network that takes single images"


def takes_clips(model: nn.Module, size: tuple[int, ...], reason: str) -> bool:
    """Whether it failed because its first convolution looks at several frames. size: of what it was given (batch, channels,
    height, width), which a Conv3d takes for one clip without a batch axis; reason: as of `DoesNotRun`.
    """
    as_one = "(Conv3d): " in reason and f"[{', '.join(map(str, (1, *size)))}]" in reason
    return isinstance(_stated_stem(model), nn.Conv3d) and (as_one or "expected 5, got 4" in reason)


def _stated_stem(model: nn.Module) -> Any:
    """The first convolution that is registered, or None."""
    return next((m for m in modules(model) if isinstance(m, _CONVOLUTIONS)), None)


def _stated_channels(model: nn.Module) -> int | None:
    """Channels into that."""
    return getattr(_stated_stem(model), "in_channels", None)


def logits_of(output: Any, which: int | str | None = None) -> Tensor:
    """The logits in what a network returns (a tensor, `.logits`, a dictionary or a tuple): of a classifier (B, K), of a
    segmentation network (B, K, h, w). which: index or name of one of several outputs.
    """
    if which is not None:
        holder: Any = output
        found: Any = holder[which] if isinstance(output, (dict, list, tuple)) else getattr(output, str(which))
    elif isinstance(output, Tensor):
        found = output
    elif isinstance(output, dict) and not {"logits", "out"}.isdisjoint(output):
        found = output.get("logits", output.get("out"))
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, dict):  # under a name of the user's own
        maps = [v for v in output.values() if isinstance(v, Tensor) and v.ndim == 4]
        found = maps[0] if len(maps) == 1 else None
    else:
        found = output[0] if isinstance(output, (tuple, list)) and output else None
    if not isinstance(found, Tensor) or found.ndim not in (2, 4):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(output).__name__
        raise DownresError(
            f"A classifier returns logits of shape (batch, classes), a segmentation network (batch, classes, height, width), "
            f"this model returns {shape}: give another model."
        )
    if not found.is_floating_point():
        raise DownresError(
            f"Logits are real numbers, this model returns {str(found.dtype).removeprefix('torch.')}: give it without what "
            "makes classes of them (argmax or a threshold)."
        )
    return found


@dataclass(frozen=True)
class Answer:
    """What a network answers with.

    head: name of the linear layer whose output the logits are, or None; width: number of its inputs (without a head, of
    logits); outputs: number of logits. Of a segmentation network size: (h, w) of its logits, None for a classifier;
    align_corners: as in the last bilinear or bicubic upsampling that it does itself. probability: they are no logits, they went
    through a sigmoid, or of several outputs a softmax over them. which: index or name of this one among several outputs, None
    where the network has one, or says itself which is its answer.
    """

    head: str | None
    width: int
    outputs: int
    size: tuple[int, int] | None = None
    align_corners: bool = False
    probability: bool = False
    which: int | str | None = None


_AFTER_SIGMOID = (
    "upsample",
    "view",
    "reshape",
    "squeeze",
    "unsqueeze",
    "clone",
    "slice",
    "clamp",
    "to_copy",
    "alias",
    "select",
)
"""Beginnings of the names of operators, an underscore in front left out, that leave a probability what it is."""


def _over_outputs(name: str, args: Sequence[Any]) -> bool:
    """Whether an operator is a softmax over the outputs of a batch."""
    return name in ("softmax", "safe_softmax") and len(args) > 1 and args[0].ndim > 1 and args[1] % args[0].ndim == 1


class _Operators(TorchDispatchMode):
    """Sees the `align_corners` of every upsampling, and which tensors are probabilities: what comes out of a sigmoid, or of a
    softmax over the outputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.align_corners = False
        self.probabilities: dict[int, Tensor] = {}  # kept alive, so that no id is used twice
        self.shares: set[int] = set()  # of those from a softmax; of one output that is always 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.name in ("aten::upsample_bilinear2d", "aten::upsample_bicubic2d"):
            x, _size, align_corners, *_ = args
            if max(x.shape[-2:]) > 1:  # of a pooled map of one pixel it means nothing
                self.align_corners = bool(align_corners)
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").removeprefix("_")
        if isinstance(out, Tensor) and (
            name in ("sigmoid", "hardsigmoid")
            or _over_outputs(name, args)
            or (args and id(args[0]) in self.probabilities and name.startswith(_AFTER_SIGMOID))
        ):
            self.probabilities[id(out)] = out
            if _over_outputs(name, args) or (args and id(args[0]) in self.shares):
                self.shares.add(id(out))
        return out


def find_answer(model: nn.Module, input_size: tuple[int, ...], which: int | str | None = None) -> Answer:
    """What kind of network this is, by running it once. input_size: as for `fake_run`. which: of several outputs, else the
    first is looked at that may be logits.

    Raises DownresError when the model does not run, or returns no logits.
    """
    return _answer(model, _look_at_answer(model, input_size), which)


def find_answers(model: nn.Module, input_size: tuple[int, ...]) -> dict[int | str | None, Answer]:
    """Everything in what a network returns that may be its logits, by index or name; under None what it says itself is its
    answer: a lone tensor, `.logits`, 'out'. Raises DownresError as `find_answer` does.
    """
    seen = _look_at_answer(model, input_size)
    output = seen["output"]
    items: Any = output.items() if isinstance(output, dict) else enumerate(output) if isinstance(output, (list, tuple)) else ()
    found: dict[int | str | None, Tensor] = {
        k: v for k, v in items if isinstance(v, Tensor) and v.ndim in (2, 4) and v.is_floating_point()
    }
    told = not items or hasattr(output, "logits") or (isinstance(output, dict) and not {"logits", "out"}.isdisjoint(output))
    answers = {key: _answer(model, seen, key) for key in found}
    return {None: _answer(model, seen), **answers} if told or list(found) in ([], [0]) else answers


@dataclass(frozen=True)
class Tried:
    """What one run without numbers returned. answer: None where there are no logits; main: where they are; align_corners: as
    in the last upsampling of the network's own.
    """

    outputs: Outputs
    answer: Answer | None = None
    main: Path | None = None
    align_corners: bool = False


def try_once(model: nn.Module, input_size: tuple[int, ...]) -> Tried:
    """All that a model returns, and what kind of answer that is, from one run as `fake_run` does it; it may ask for several
    images. Raises `DoesNotRun` when it does not run.
    """
    seen = _look_at_answer(model, input_size, several=True)
    outputs, align_corners = dict(tensors_in(seen["output"])), seen["operators"].align_corners
    try:
        answer, logits = _answer(model, seen), logits_of(seen["output"])
    except DownresError:  # features, boxes, classes, …
        return Tried(outputs, align_corners=align_corners)
    main = next((path for path, tensor in outputs.items() if tensor is logits), None)
    return Tried(outputs, answer, main, align_corners)


def outputs_of(model: nn.Module, input_size: tuple[int, ...]) -> Outputs:
    """All that a model returns, from one run as `fake_run` does it; it may ask for several images."""

    @contextmanager
    def watch(copied: nn.Module, x: Tensor) -> Iterator[list[Any]]:
        seen: list[Any] = []
        copied.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        yield seen

    return dict(tensors_in(fake_run(model, input_size, watch, several=True)[-1]))


def rows_of(model: nn.Module, input_size: tuple[int, ...]) -> tuple[list[tuple[str, int]], list[int]]:
    """([(module, rows of what it is given)] in order, rows of every tensor that the model returns), from one run as `fake_run`
    does it.
    """

    @contextmanager
    def watch(copied: nn.Module, x: Tensor) -> Iterator[tuple[list[tuple[str, int]], list[int]]]:
        given: list[tuple[str, int]] = []
        returned: list[int] = []
        for name, module in named_modules(copied):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: given.extend(
                    (f"{name} ({type(module).__name__})", n) for n in rows(inputs)[:1]
                )
            )
        copied.register_forward_hook(lambda _module, _inputs, output: returned.extend(rows(output)))
        yield given, returned

    return fake_run(model, input_size, watch, several=True)


def rows(values: Any) -> list[int]:
    """The first side of every tensor in these."""
    return [leaf.shape[0] for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.ndim]


def check_rows(model: nn.Module, input_size: tuple[int, ...], returned: list[int]) -> None:
    """Raises DownresError for a network that returns a row for each image at its own size and not at this one: what flattens
    with a fixed number of features (`view(-1, 400)`) makes rows of parts of images, or of several.

    returned: the rows of what it returns here.
    """
    images, *shape = batched(input_size)
    if all(n == images for n in returned):
        return
    own = images, shape[0], *input_size_of(model)[1:]
    try:
        given_there, returned_there = rows_of(model, own)
    except DownresError:  # its own size is another
        return
    if len(returned_there) != len(returned) or not any(
        there == images != here for there, here in zip(returned_there, returned, strict=True)
    ):
        return
    given_here, _ = rows_of(model, input_size)
    pairs = zip(given_there, given_here, strict=False)
    where = next((name for (_, there), (name, here) in pairs if there == images != here), "")
    count = next(here for there, here in zip(returned_there, returned, strict=True) if there == images != here)
    many = "1 image" if images == 1 else f"{images} images"
    here, there = "x".join(map(str, shape)), "x".join(map(str, own[1:]))
    raise DownresError(
        f"{type(model).__name__} returns {count} row{'s' * (count > 1)} for {many} of {here}, and one an image of {there}: "
        f"what flattens{f' before {where}' if where else ''} counts on one size, give a size that it is made for."
    )


def tensors_in(output: Any, path: Path = (), seen: set[int] | None = None) -> Iterator[tuple[Path, Tensor]]:
    """The tensors, arrays and lists of numbers in what a network returns, with the keys, indices and names of attributes that
    lead to each; those in one container by the first way to it.
    """
    seen = set() if seen is None else seen
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, np.ndarray):
        if output.dtype.kind in "biuf":
            yield path, torch.as_tensor(output)
    elif isinstance(output, (list, tuple)) and output and all(isinstance(value, (int, float)) for value in output):
        yield path, torch.tensor(output)
    elif id(output) not in seen and (items := items_of(output)) is not None:
        seen.add(id(output))
        for key, value in items:
            yield from tensors_in(value, (*path, key), seen)


def items_of(output: Any) -> list[tuple[Any, Any]] | None:
    """What a container or a record of any class holds, by key, index or name; None of anything else."""
    if isinstance(output, dict):
        return list(output.items())
    if isinstance(output, (list, tuple)):
        return list(enumerate(output))
    if isinstance(output, (type, Tensor, nn.Module)) or callable(output):
        return None
    slots = [vars(kind).get("__slots__", ()) for kind in type(output).__mro__]
    names = [name for found in slots for name in ((found,) if isinstance(found, str) else found)]
    held = {name: getattr(output, name) for name in names if hasattr(output, name)}
    return list((held | getattr(output, "__dict__", {})).items()) or None


def _look_at_answer(model: nn.Module, input_size: tuple[int, ...], several: bool = False) -> dict[str, Any]:

    @contextmanager
    def watch(copied: nn.Module, x: Tensor) -> Iterator[dict[str, Any]]:
        # By the id of what the layer returned, which is kept alive so that no id is used twice.
        linear: dict[int, tuple[str, int, Tensor]] = {}
        seen: dict[str, Any] = {"linear": linear}
        for name, module in named_modules(copied):
            if isinstance(module, nn.Linear) and name:
                module.register_forward_hook(
                    lambda m, _inputs, out, name=name: linear.__setitem__(id(out), (name, m.in_features, out))
                )

        copied.register_forward_hook(lambda _module, _inputs, output: seen.update(output=output))
        with _Operators() as seen["operators"]:
            yield seen

    return fake_run(model, input_size, watch, several)


def _answer(model: nn.Module, seen: dict[str, Any], which: int | str | None = None) -> Answer:
    logits = logits_of(seen["output"], which)
    outputs, operators = logits.shape[1], seen["operators"]
    probability = id(logits) in operators.probabilities and not (outputs == 1 and id(logits) in operators.shares)
    several = (
        seen["output"] if which is None and isinstance(seen["output"], list) else ()
    )  # a tuple is logits first, then what else there is
    if len({t.shape[1] for t in several if isinstance(t, Tensor) and t.ndim == 4}) > 1:
        raise DownresError(f"{type(model).__name__} returns several maps of different channels: features and no logits.")
    if logits.ndim == 4:
        size = (logits.shape[2], logits.shape[3])
        return Answer(None, outputs, outputs, size, operators.align_corners, probability, which)
    name, width, _ = seen["linear"].get(id(logits), (None, outputs, None))
    return Answer(name, width, outputs, None, False, probability, which)


def chosen_answer(answers: dict[int | str | None, Answer], index: int | str | None) -> Answer:
    """The answer of that index or name; DownresError where there is none."""
    if index not in answers and isinstance(index, str) and index.lstrip("-").isdecimal():
        index = int(index)  # as the command line has it
    if index not in answers:
        known = ", ".join(repr(key) for key in answers if key is not None) or "no index, for there is one"
        raise DownresError(f"There is no output {index!r} of the shape of logits: the network's outputs have {known}.")
    return answers[index]
