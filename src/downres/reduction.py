"""`reduce`: a new model that looks at fewer pixels or tokens, with the inputs and outputs of the original."""

import contextlib
import difflib
import math
import re
import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .copying import copied, keeps_hooks, modules, named_modules, refuse_sealed, rooted, unwrapped
from .errors import DownresError
from .families.adapter import Adapter, Size
from .families.find import find_adapter, library_transformers
from .parse import Resolution, as_hw, format_resolution
from .probe import (
    CLIPS,
    DoesNotRun,
    Outputs,
    Path,
    Tried,
    channels_of,
    input_size_of,
    materialised,
    outputs_of,
    required_inputs,
    takes_clips,
    total_stride,
    try_once,
)
from .records import Candidate, Change, Merge, Record
from .reductions.dense import FullSize, Map, Tokens, as_map
from .reductions.resize import input_size
from .reductions.tokens import PoolTokens, TokenState
from .techniques import techniques

_LENGTHS = re.compile(r"box|anchor|offset|flow|dispar|keypoint|landmark", re.IGNORECASE)
"""Of names under which a network returns numbers that grow with its image: a map of them at full size would hold wrong ones."""

_MOTION = re.compile(r"(^|_)(flow|disp)", re.IGNORECASE)
"""Of names of the parts that compute such numbers in networks that return them without a name."""


@dataclass(frozen=True)
class Reduction(Record):
    """What `reduce` did to a model; kept on the reduced model as `model.downres`."""

    candidate: Candidate
    changes: tuple[Change, ...]


def reduce(
    model: nn.Module,
    candidate: Candidate | None = None,
    *,
    resolution: Resolution | None = None,
    stem_scale: float = 1.0,
    stem: str | None = None,
    patch_size: int | None = None,
    merge: Merge | int | float | str | None = None,
    ragged: str = "error",
    depth: int | None = None,
    width: float = 1.0,
    interpolation: str = "bilinear",
    input_size: tuple[int, ...] | None = None,
    resize_input: bool = True,
    output_size: Size | str | None = None,
    output_interpolation: str = "bilinear",
    align_corners: bool | None = None,
) -> nn.Module:
    """A copy of `model` that works on fewer pixels or tokens; `model` itself is not touched.

    Drop-in: takes the same inputs at any size, returns outputs of the same shape. The copy goes through copy.deepcopy,
    torch.compile and torch.export; its state dict keeps its keys (of a resized transformer, position embeddings, tables of
    positions and the patch kernel have other shapes). What was changed is on the result as `reduced.downres.changes`; a call
    that changes nothing warns.

    Args:
        candidate: what to reduce; or give its fields as keywords.
        resolution: the input is resized to this before the embedding: short side in pixels with the aspect ratio
            kept, or (height, width). A network of fixed size (most transformers) is made for it: position embeddings and
            tables are resampled from the original's.
        stem_scale: factor on height and width of the activations after the embedding (Morlier et al. 2025, sec. III); of a
            transformer on its grid of patch tokens, which gets its size back after the last block.
        stem: dotted name of the module after which to resample; found by running the model once when None, of a
            transformer the patch embedding with its position embedding.
        patch_size: side of the patches in pixels; the patch kernel is resized by pseudo-inverse (FlexiViT, Beyer et al. 2023).
        merge: tokens to merge or prune in every block: see `Merge`; 8 is a number a block, 0.5 a fraction kept, '8-decreasing',
            'prune8'. After the last block every patch gets its token, so that whatever follows sees the whole grid.
        ragged: what to do with a side that the patches do not divide: 'error', 'floor' (cut) or 'pad'.
        depth, width: another network of the same design, weights drawn anew: for costs, or to be trained.
        interpolation: 'bilinear' or 'bicubic', always antialiased.
        input_size: (C, H, W) that the original is used at; default: the model's own configuration, else 3×224×224.
        resize_input: False leaves the resize out: the reduced model then takes inputs of the candidate's resolution, and
            a segmentation network gives logits of that size.
        output_size: of the logits (B, K, h, w) of a segmentation network: None, that of the original's logits (of most its
            input's size, of SegFormer a quarter of it); 'input', that of the input; (height, width), that of the labels.
        output_interpolation: 'bilinear' or 'bicubic', of these logits.
        align_corners: of these logits; None: as in the upsampling that the network does itself.

    Raises:
        DownresError: no such module, no patches or tokens to work on, sizes that do not fit, the model was reduced before;
            and by the result when it runs, if the module returns no feature map.
    """
    given = Candidate(resolution, stem_scale, stem, patch_size, merge, ragged, depth, width)  # type: ignore[arg-type]
    if candidate is None:
        candidate = given
    elif given != Candidate():
        raise DownresError("Give reduce either a candidate or its fields (resolution, stem_scale, merge, …), not both.")
    if interpolation not in ("bilinear", "bicubic"):
        raise DownresError(f"The interpolation is bilinear or bicubic, {interpolation!r} is neither.")
    refuse_sealed(model)
    model = materialised(unwrapped(model), input_size)
    if isinstance(before := getattr(model, "downres", None), Reduction):
        raise DownresError(f"This model was reduced before ({before.candidate}): reduce the original instead.")
    if output_interpolation not in ("bilinear", "bicubic"):
        raise DownresError(f"Logits are upsampled by bilinear or bicubic interpolation, {output_interpolation!r} is neither.")
    work = Work(copied(model), candidate, interpolation, tuple(input_size or input_size_of(model)), resize_input)
    work.apply(model)
    if not resize_input and output_size is not None:
        raise DownresError("Without the resize of its input a network gives logits of that size: leave output_size out.")
    if resize_input:
        work.try_out(model, output_size, output_interpolation, align_corners)
    elif work.adapter is None and work.changes_anything:
        work.run_small(model)
    if not work.changes and resize_input:
        *first, last = (t.sought for t in techniques() if t.sought)
        warnings.warn(
            f"reduce changed nothing: it looked for {', '.join(first)} and {last}, and the candidate has none.", stacklevel=2
        )
    work.small.downres = done = Reduction(candidate, tuple(work.changes))  # type: ignore[assignment]
    for name, module in list(named_modules(work.small)):
        if not keeps_hooks(module):
            work.replace(name, rooted(module))
    work.small.downres = done  # type: ignore[assignment]
    return work.small


def takes_any_size(model: nn.Module) -> bool:
    """Whether one and the same network serves every input resolution: a convnet does, most transformers do not."""
    adapter = find_adapter(model)
    return adapter is None or (adapter.image is None and not adapter.resamples_itself)


def is_flexible(adapter: Adapter) -> bool:
    """Whether a transformer takes whatever size comes, as a convnet does, and has no grid of tokens to count on."""
    return adapter.image is None and not adapter.block_names()


def divided_by(model: nn.Module, image: Size, channels: int | None = None, stride: int | None = None) -> Size:
    """What height and width are divided by: a network's patches or windows, else its total stride, in pixels.

    stride: the total stride, where it is known.
    """
    adapter = find_adapter(model)
    if adapter is None or is_flexible(adapter):
        stride = stride or total_stride(model, image, channels or channels_of(model, (3, *image)))
        height, width = adapter.unit if adapter is not None else (1, 1)
        return math.lcm(stride, height), math.lcm(stride, width)
    return adapter.unit


def made_for(model: nn.Module, image: Size) -> nn.Module:
    """The model itself where it takes images of (height, width), else a copy of it that is made for them.

    It counts as an original, not as reduced: the network that is used at a resolution other than it was built for.
    """
    adapter = find_adapter(model)
    if adapter is None or adapter.image in (None, tuple(image)):
        return model
    model = reduce(model, resolution=image, resize_input=False)
    del model.downres
    return model


def token_map(model: nn.Module, x: Tensor) -> Tensor:
    """Which patches of each image a reduced model merged: (B, rows, columns) int64, equal numbers went into one token.

    model: made by `reduce` with `merge`. x: what the model takes. Raises DownresError when it merges nothing.
    """
    tokens = (getattr(module, "tokens", None) for module in modules(model))
    state = next((found for found in tokens if isinstance(found, TokenState)), None)
    if state is None:
        raise DownresError("This model merges no tokens: give one made by reduce(model, merge=8).")
    adapter = find_adapter(model)
    assert adapter is not None
    sizes: list[Size] = []

    def see(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        images = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 4]
        sizes.extend((v.shape[-2], v.shape[-1]) for v in images)

    handle = adapter.module.register_forward_pre_hook(see, with_kwargs=True)  # after whatever resizes the input
    state.keep_map = True
    try:
        with torch.no_grad():
            model(x)
        assert state.map is not None
        return state.map.unflatten(1, state.grid or adapter.grid(sizes[0]))
    finally:
        handle.remove()
        state.keep_map, state.map = False, None


class Work:
    """One call of `reduce`: what techniques are given, what they tell each other, and the changes so far.

    small: the copy that they change. native: (channels, height, width) that the original is used at.
    target: (height, width) in pixels that the candidate asks for; image: what the network sees after cutting or padding.
    """

    def __init__(
        self, small: nn.Module, candidate: Candidate, interpolation: str, native: tuple[int, ...], resize_input: bool = True
    ) -> None:
        self.small, self.candidate, self.interpolation, self.native = small, candidate, interpolation, native
        self.resize_input = resize_input
        self.changes: list[Change] = []
        self.adapter = find_adapter(small)
        self.own: Size = (self.adapter.image if self.adapter else None) or (native[-2], native[-1])
        """(height, width) that the original is run at."""
        self.grid = self.adapter.grid(self.own) if self.adapter is not None and self.adapter.block_names() else None
        """(rows, columns) of the original's patch tokens, where they are a plain sequence."""
        self.image: Size = (native[-2], native[-1])
        self.patch: Size | None = None
        """Another side of the patches."""
        self.one_grid = False
        """Whether something inside counts on a grid of tokens of one size."""
        self.fit_later = False
        """Whether something inside makes the network for its size itself."""
        self.pooled: PoolTokens | None = None
        self.first = 0
        """Block that merging starts at."""
        self.fewer_tokens = False
        self.resampled_at: str | None = None
        """Module that was named to have its output resampled."""
        self.instead = "reduce less"
        """Ends a sentence that refuses."""

    def note(self, kind: str, module: str, detail: str) -> None:
        self.changes.append(Change(kind, module, detail))

    def need_adapter(self, what: str) -> Adapter:
        if self.adapter is None:
            kind = type(self.small).__name__
            raise DownresError(
                f"{what} needs a vision transformer with patches, {kind} has none that downres knows: lower its resolution, "
                "or resample after its stem with stem_scale."
            )
        return self.adapter

    def replace(self, name: str, new: nn.Module) -> None:
        """Another module in the place of that name, '' for the whole network."""
        if name == "":
            self.small = new
        else:
            self.small.set_submodule(name, new)
        self.adapter = find_adapter(self.small)

    def named(self, name: str) -> nn.Module:
        return _named(self.small, name)

    @cached_property
    def target(self) -> Size:
        image = (self.adapter.image if self.adapter else None) or self.native[-2:]
        height, width = image[0], image[1]
        resolution = self.candidate.resolution
        return (height, width) if resolution is None else input_size((height, width), resolution)

    def divided_by(self, image: Size) -> Size:
        return divided_by(self.small, image, self.native[0])

    @property
    def is_flexible(self) -> bool:
        return self.adapter is not None and is_flexible(self.adapter)

    @property
    def changes_anything(self) -> bool:
        return self.candidate != Candidate()

    def apply(self, original: nn.Module) -> None:
        """Every technique in its order, and a run where nothing else can tell whether that works: better now than when it
        serves.
        """
        c = self.candidate
        chosen = sorted((t for t in techniques() if t.always or t.is_on(c)), key=lambda t: t.order)
        for t in chosen:
            t.prepare(self)
        adapter = self.adapter
        for t in chosen:
            t.apply(self)
        for t in chosen:
            t.finish(self)
        if adapter is None or not self.changes_anything:
            return
        # What is around a transformer may expect its old grid, or read tokens between its blocks, where they have none.
        inside = adapter.name != ""
        if adapter.sure and not inside:
            return
        if c.resolution is not None or any(t.refits for t in c.techniques if not t.always):
            self._refuse_second(adapter)
        kind = type(self.small if adapter.sure else adapter.module).__name__
        size = (self.native[0], *self.target)
        try:
            found = _output_shapes(self.small, size)
        except DoesNotRun as error:
            if not _runs(original, self.native):
                if adapter.sure:
                    return  # the original takes something else than one image: this run tells nothing
                shape = (self.native[0], *self.own)
                raise _cannot_be_tried(original, shape, error.reason, ", or a network that takes images") from error
            raise DownresError(
                f"{kind} cannot be made for '{c}' (it fails with: {error.reason}): {self.instead}, or give another resolution."
            ) from error
        named = self.resampled_at is not None
        dense = any(len(shape) > 2 for shape in found)
        if not (named and not dense) and not (inside and dense and self.fewer_tokens):
            return
        whole = c.without(*(t for t in c.techniques if t.inside))
        with warnings.catch_warnings(action="ignore"):
            wanted = _output_shapes(reduce(original, whole, input_size=self.native), size)
        if found != wanted and named:
            raise DownresError(
                f"Resampling after {self.resampled_at!r} changes the shape of what {type(self.small).__name__} returns, "
                f"{found} in place of {wanted}, so its output is no map (batch, channels, height, width): {self.instead}."
            )
        if found != wanted:
            raise DownresError(
                f"{type(self.small).__name__} takes tokens out of {adapter.name} between its blocks, where '{c}' has changed "
                "their number: lower the resolution instead."
            )

    def try_out(self, original: nn.Module, size: Size | str | None, interpolation: str, align_corners: bool | None) -> None:
        """Original and reduced model run once without numbers, and all that they return is compared: logits for every pixel and
        other maps get the size that the original's have, any other difference is refused.

        size, interpolation, align_corners: of the logits, as in `reduce`.
        """
        c, own = self.candidate, self.own
        if c == Candidate() and size is None:
            return
        if isinstance(size, str) and size != "input":
            raise DownresError(
                f"The size of logits is 'input' or (height, width), {size!r} is neither: give for example 'input'."
            )
        image = (self.native[0], *own)
        try:
            whole = try_once(original, image)
        except DoesNotRun as error:
            self._untried(original, error, needed=size is not None)
            return
        maps, stay = self._maps(original, whole.outputs, self._outputs(image))
        main = maps.get(whole.main) if whole.main is not None else None  # type: ignore[arg-type]
        grows = isinstance(main, Map) and (main.ndim, main.rows) == (4, 2)
        answer = whole.answer
        if size is not None and (main is not None and not grows or not _is_dense(whole, own)):
            raise DownresError(
                f"Only logits for every pixel (batch, classes, height, width) have a size, {type(original).__name__} returns "
                "none: leave output_size out."
            )
        if not maps and size is None:
            return
        if c.ragged != "error":
            raise DownresError(
                "An answer to every pixel needs an input that is neither cut nor padded: reduce to a resolution that "
                "the network divides, with ragged='error'."
            )
        dense = grows or size is not None
        aligned = whole.align_corners if align_corners is None else align_corners
        fixed = None if size is None or isinstance(size, str) else as_hw(size)
        # Of the original: resampling behind the embedding changes what the reduced network gives.
        strides = None
        if dense:
            assert answer is not None and answer.size is not None
            strides = (1.0, 1.0) if size == "input" else (own[0] / answer.size[0], own[1] / answer.size[1])
        full = FullSize(fixed, strides, maps, frozenset(stay - {whole.main}), interpolation, aligned)
        self.small.register_forward_pre_hook(full.before, with_kwargs=True, prepend=True)
        self.small.register_forward_hook(full.after, with_kwargs=True)
        what = format_resolution(fixed) if fixed else f"the size of the {'input' if size else 'original'}"
        self.note("logits upsample" if dense else "maps upsample", "", f"to {what}, {interpolation}, align_corners={aligned}")

    def _outputs(self, image: tuple[int, ...]) -> Outputs:
        """What the reduced model returns for an image; DownresError where it does not run."""
        try:
            return outputs_of(self.small, image)
        except DoesNotRun as error:
            raise DownresError(
                f"{type(self.small).__name__} does not run as '{self.candidate}' ({error.reason}): give sides that it divides, "
                "or make what counts on one size in it follow its input."
            ) from error

    def run_small(self, original: nn.Module) -> None:
        """Without the resize inside, maps follow the smaller image; that it runs, and one row stays one row, is looked at."""
        small = self._outputs((self.native[0], *self.target))
        with contextlib.suppress(DoesNotRun):
            whole = outputs_of(original, (self.native[0], *self.own))
            for path, x in small.items():
                if path in whole and x.ndim == whole[path].ndim == 2 and x.shape != whole[path].shape:
                    at, own = format_resolution(self.target), format_resolution(self.own)
                    raise DownresError(
                        f"{type(original).__name__} returns {tuple(whole[path].shape)} and at {at} px {tuple(x.shape)}: "
                        f"it counts on images of {own} px, give a network that takes any size."
                    )

    def _untried(self, original: nn.Module, error: DoesNotRun, needed: bool) -> None:
        """Of an original that does not run on one image alone nothing is known; of others, and where that is `needed`, the size
        to try at is asked for.
        """
        image = (self.native[0], *self.own)
        try:
            if not needed:
                outputs_of(self.small, image)
        except DoesNotRun:
            needed = len(required_inputs(original)) == 1
        if needed:
            raise _cannot_be_tried(original, image, error.reason) from error

    def _maps(self, original: nn.Module, whole: Outputs, small: Outputs) -> tuple[dict[Path, Map | Tokens], set[Path]]:
        """Where the answers of original and reduced model are maps whose size follows the image, which may not show at the
        original's own size; and where they are of a size that does not. DownresError for an answer that changes its shape
        and is no map.
        """
        own = self.own
        ratio = (self.target[0] / own[0], self.target[1] / own[1])
        maps: dict[Path, Map | Tokens] = {}
        for path in {**whole, **small}:
            shapes = [tuple(answer[path].shape) if path in answer else None for answer in (whole, small)]
            if shapes[0] == shapes[1]:
                # No row an image, or an entry an image: then a row for each thing that it finds, which may be one.
                found_things = shapes[0] and (shapes[0][0] != 1 or (len(path) > 1 and isinstance(path[0], int)))
                if found_things and _is_length(path):
                    raise DownresError(
                        f"{type(original).__name__} returns {'.'.join(map(str, path))!r} of what it finds in pixels of what it "
                        "sees: give resize_input=False, and images of the lower resolution."
                    )
                continue
            found = None
            if shapes[0] and shapes[1]:
                found = as_map(shapes[0], shapes[1], own, ratio) or self._as_tokens(shapes[0], shapes[1])
            if found is None or _is_length(path) or _is_motion(original, self.native[0], shapes[0]):
                name = f" as {'.'.join(map(str, path))!r}" if path else ""
                why = "is no map that can be brought back to size"
                then = "give resize_input=False if what uses it can do with another shape"
                if found is not None:
                    why = "holds lengths in pixels of what it sees"
                elif shapes[0] and shapes[1] and shapes[0][0] != shapes[1][0]:
                    why, then = "is no row an image any more", "give a network that takes any size"
                raise DownresError(
                    f"{type(original).__name__} returns{name} {shapes[0] or 'nothing'} and, reduced to '{self.candidate}', "
                    f"{shapes[1] or 'nothing'}, which {why}: {then}."
                )
            maps[path] = found
        same = {path for path in whole if path not in maps and whole[path].ndim > 2}
        known = self.target != own
        if same and not (self.adapter is not None and self.adapter.image):
            with contextlib.suppress(DoesNotRun):
                twice = outputs_of(original, (self.native[0], *(2 * side for side in own)))
                known = True
                for path in same:
                    if path in twice and (found := as_map(whole[path].shape, twice[path].shape, own, (2, 2))):
                        maps[path] = found
        return maps, same - maps.keys() if known else set()

    def _as_tokens(self, whole: tuple[int, ...], small: tuple[int, ...]) -> Tokens | None:
        """The sequence of a transformer that hands out its tokens (B, prefix + N, C)."""
        if self.grid is None or self.adapter is None or len(whole) != 3 or whole[2] != small[2]:
            return None
        grid, prefix = self.adapter.grid(self.image), whole[1] - math.prod(self.grid)
        if not 0 <= prefix <= self.adapter.prefix or small[1] != prefix + math.prod(grid):
            return None
        return Tokens(prefix, grid, (self.own[0] / self.grid[0], self.own[1] / self.grid[1]))

    def _refuse_second(self, adapter: Adapter) -> None:
        """Another size of image or patch reaches one transformer alone."""
        for other in library_transformers(self.small):
            if other.name != adapter.name and other.image is not None:
                raise DownresError(
                    f"{type(self.small).__name__} holds two transformers, {adapter.name} and {other.name}, and only the first "
                    "would be made for another size: reduce each by itself and put them together again."
                )


def _cannot_be_tried(original: nn.Module, image: tuple[int, ...], reason: str, otherwise: str = "") -> DownresError:
    """Of an original that does not run at its own size."""
    size = f"give the size that it is used at as input_size=(channels, height, width){otherwise}"
    return DownresError(
        f"{type(original).__name__} does not run on an image of {'x'.join(map(str, image))} ({reason}), so what it becomes "
        f"cannot be tried: {CLIPS if takes_clips(original, (1, *image[-3:]), reason) else size}."
    )


def _is_length(path: Path) -> bool:
    return _LENGTHS.search(".".join(map(str, path))) is not None


def _is_motion(model: nn.Module, channels: int, shape: tuple[int, ...] | None) -> bool:
    """Whether a map is likely one of displacements between two images: of one or two numbers a pixel, from a network that takes
    two (or six channels) and has a part named so."""
    few = shape is not None and (len(shape) == 3 or (len(shape) == 4 and shape[1] <= 2))
    two = len(required_inputs(model)) > 1 or channels == 6
    return few and two and any(_MOTION.search(name.rpartition(".")[2]) for name, _ in named_modules(model))


def _runs(model: nn.Module, native: tuple[int, ...]) -> bool:
    adapter = find_adapter(model)
    size = (adapter.image if adapter is not None else None) or native[-2:]
    try:
        _output_shapes(model, (native[0], *size))
    except DownresError:
        return False
    return True


def _is_dense(found: Tried, image: Size) -> bool:
    """Whether there are logits (B, K, h, w); (B, h, w, K) is told by which sides are in the proportion of the image's."""
    if found.answer is None or found.answer.size is None or found.main is None:
        return False

    def skewed(rows: int, columns: int) -> float:
        return abs(math.log(rows * image[1] / (columns * image[0])))

    _batch, first, second, third = found.outputs[found.main].shape
    return not skewed(first, second) < 0.1 < skewed(second, third)


def _output_shapes(model: nn.Module, input_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of all tensors that the model returns."""
    return [tuple(t.shape) for t in outputs_of(model, input_size).values()]


def _named(model: nn.Module, name: str) -> nn.Module:
    found = dict(named_modules(model))
    if name not in found or name == "":
        near = difflib.get_close_matches(name, found, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"its first modules are {', '.join(list(found)[1:6])}."
        raise DownresError(f"The model has no module {name!r}: {hint}")
    return found[name]
