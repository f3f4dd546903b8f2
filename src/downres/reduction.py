"""`reduce`: a new model that looks at fewer pixels or tokens, with the inputs and outputs of the original."""

import contextlib
import dataclasses
import difflib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .errors import DownresError
from .families.adapter import Adapter, Size, said
from .families.find import find_adapter, library_transformers
from .models.regseg import RegSeg
from .parse import Resolution, as_hw, format_resolution
from .probe import Answer, copied_with, fake_run, find_answer, find_stem, input_size_of, total_stride
from .records import MERGE, PRUNE, Candidate, Change, Merge, Record
from .reductions.dense import FullSizeLogits
from .reductions.resize import FitInput, ResampleOutput, ResizeInput, fitted, input_size
from .reductions.tokens import PoolTokens, TokenState, UnpoolTokens, removals


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
    if isinstance(before := getattr(model, "downres", None), Reduction):
        raise DownresError(f"This model was reduced before ({before.candidate}): reduce the original instead.")
    if output_interpolation not in ("bilinear", "bicubic"):
        raise DownresError(f"Logits are upsampled by bilinear or bicubic interpolation, {output_interpolation!r} is neither.")
    work = _Work(copied_with(model, {}), candidate, interpolation, tuple(input_size or input_size_of(model)))
    work.scale()
    work.geometry(resize_input)
    work.shorten(model)
    if not resize_input and output_size is not None:
        raise DownresError("Without the resize of its input a network gives logits of that size: leave output_size out.")
    if resize_input:
        work.answer(model, output_size, output_interpolation, align_corners)
    if not work.changes and resize_input:
        warnings.warn(
            "reduce changed nothing: it looked for a resolution, a stem_scale below 1, a patch_size and a merge, "
            "and the candidate has none.",
            stacklevel=2,
        )
    work.small.downres = Reduction(candidate, tuple(work.changes))  # type: ignore[assignment]
    return work.small


def takes_any_size(model: nn.Module) -> bool:
    """Whether one and the same network serves every input resolution: a convnet does, most transformers do not."""
    adapter = find_adapter(model)
    return adapter is None or (adapter.image is None and not adapter.resamples_itself)


def is_flexible(adapter: Adapter) -> bool:
    """Whether a transformer takes whatever size comes, as a convnet does, and has no grid of tokens to count on."""
    return adapter.image is None and not adapter.block_names()


def divided_by(model: nn.Module, image: Size, channels: int = 3) -> Size:
    """What height and width are divided by: a network's patches or windows, else its total stride, in pixels."""
    adapter = find_adapter(model)
    if adapter is None or is_flexible(adapter):
        return (total_stride(model, image, channels),) * 2
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
    tokens = (getattr(module, "tokens", None) for module in model.modules())
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


class _Work:
    """One call of `reduce`: the copy, what is known of it, and the changes so far."""

    def __init__(self, small: nn.Module, candidate: Candidate, interpolation: str, native: tuple[int, ...]) -> None:
        self.small, self.candidate, self.interpolation, self.native = small, candidate, interpolation, native
        self.changes: list[Change] = []
        self.adapter = find_adapter(small)
        self.pooled: PoolTokens | None = None
        self.first = 0  # block that merging starts at

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

    def scale(self) -> None:
        """Depth and width: another network."""
        c = self.candidate
        if c.depth is None and c.width == 1.0:
            return
        if isinstance(self.small, RegSeg):
            if c.depth is not None:
                raise DownresError(
                    "The depth of a RegSeg is a factor on its blocks and no number of them: name it in the model, "
                    "regseg:exp48_decoder26,depth=0.5."
                )
            design = self.small.design.scaled(c.width)
            self.small = RegSeg(self.small.num_classes, design).train(self.small.training)
            self.note(
                "model scaling", "", f"channels ×{c.width:g}, {design.group_width} a group; weights drawn anew, to be trained"
            )
            return
        adapter = self.need_adapter("Scaling depth and width")
        self.small = _replaced(self.small, adapter.name, adapter.scale(c.depth, c.width))
        self.adapter = find_adapter(self.small)
        what = ([f"{c.depth} blocks"] if c.depth else []) + ([f"channels ×{c.width:g}"] if c.width != 1.0 else [])
        self.note("model scaling", adapter.name, f"{', '.join(what)}; weights drawn anew, to be trained")

    def geometry(self, resize_input: bool) -> None:
        """Image and patch size."""
        c, adapter = self.candidate, self.adapter
        patch = None if c.patch_size is None else (c.patch_size, c.patch_size)
        if patch is not None:
            adapter = self.need_adapter("Another patch size")
            if adapter.patch is None:
                raise DownresError(
                    f"The patch size of {type(adapter.module).__name__} cannot change: downres knows no patch embedding in it "
                    "that can be resampled; lower its resolution instead."
                )
        self.image = self.target = target = self._target()
        flexible = adapter is None or (patch is None and is_flexible(adapter))
        ragged_unit = divided_by(self.small, target, self.native[0]) if c.ragged != "error" or not flexible else (1, 1)
        if patch is not None:
            ragged_unit = patch
            if max(patch) > min(target):
                raise DownresError(
                    f"A patch of {c.patch_size} px is larger than the image of {format_resolution(target)} px: "
                    "give a smaller patch or a higher resolution."
                )
        # A grid of tokens that merging or pooling counts on is of one size, and so is what a network of fixed size takes.
        one_grid = not flexible and adapter is not None and (adapter.resamples_itself or not c.is_input_only)
        exact = one_grid or (not flexible and adapter is not None and adapter.image is not None)
        if c.resolution is not None and resize_input:
            size: Resolution = target if exact else c.resolution  # others keep the aspect ratio of what comes
            unit = adapter.unit if adapter is not None and not exact else (1, 1)
            self.small.register_forward_pre_hook(ResizeInput(size, self.interpolation, unit), with_kwargs=True)
            side = "short side" if isinstance(size, int) else "height x width"
            self.note("input resize", "", f"{side} {format_resolution(size)} px, {self.interpolation}, antialiased")
        self.image = self._fit_input(target, ragged_unit, exact)
        pools = c.stem_scale != 1.0 and adapter is not None and bool(adapter.block_names())
        if pools and self.image == target and adapter is not None and adapter.image is None:
            self.small.register_forward_pre_hook(FitInput((1, 1), False, target), with_kwargs=True)
        if adapter is None or flexible:
            return
        if c.stem_scale != 1.0 and c.stem is None and patch is None and not adapter.block_names():
            return  # `fit_behind_embedding` does it in one step: tables are resampled once
        image = self.image
        new_size = image != adapter.image if adapter.image is not None else adapter.resamples_itself and c != Candidate()
        if new_size or (patch is not None and patch != adapter.patch):
            before = _geometry(adapter)
            how = adapter.fit(image, patch)
            self.note("input size", adapter.name, f"{before} → {_geometry(adapter)}, {how}")

    def _target(self) -> Size:
        """The size in pixels of what the network will see."""
        image = (self.adapter.image if self.adapter else None) or self.native[-2:]
        height, width = image[0], image[1]
        resolution = self.candidate.resolution
        return (height, width) if resolution is None else input_size((height, width), resolution)

    def _fit_input(self, target: Size, unit: Size, exact: bool) -> Size:
        """The size that whole units make of `target`, with the hook that cuts or pads to it."""
        pad = self.candidate.ragged == "pad"
        size = fitted(target, unit, pad)
        if size == target and (exact or self.candidate.ragged == "error"):
            return target
        if self.candidate.ragged == "error":
            raise DownresError(
                f"{format_resolution(target)} px is not a multiple of {format_resolution(unit)}, which the network divides its "
                "input by: give a multiple, or choose ragged='floor' (cut the rest off) or 'pad' (zeros)."
            )
        if min(size) == 0:
            raise DownresError(
                f"Nothing is left of {format_resolution(target)} px in steps of {format_resolution(unit)}: "
                "pad, or give more pixels."
            )
        self.small.register_forward_pre_hook(FitInput(unit, pad, target if exact else None), with_kwargs=True)
        if size == target:  # only other sizes than this are ragged
            return target
        how = "padded with zeros at the right and bottom" if pad else "cut at the right and bottom"
        self.note("ragged input", "", f"{format_resolution(target)} px {how} to {format_resolution(size)}")
        return size

    def pool(self) -> None:
        """Resample after the embedding: a feature map, or the grid of a sequence of tokens."""
        c, adapter = self.candidate, self.adapter
        if c.stem_scale == 1.0:
            return
        names = adapter.block_names() if adapter else []
        where = None if c.stem is None or adapter is None else c.stem.removeprefix(adapter.inside(""))
        if adapter is None or not names or not (where is None or where in names):
            name, scale = c.stem, c.stem_scale
            if adapter is not None and name is None:
                name, scale = adapter.fit_behind_embedding(self.image, scale)
            elif adapter is not None:
                adapter.sure = False  # what follows that module was made for its whole map
            name = name or find_stem(self.small, self.native)
            _named(self.small, name).register_forward_hook(ResampleOutput(name, scale, self.interpolation))
            self.note("activation resample", name, f"height and width ×{scale:.3g}, {self.interpolation}, antialiased")
            return
        self.first = 0 if where is None else names.index(where) + 1
        blocks = adapter.blocks()
        if self.first == len(blocks):
            raise DownresError(f"{c.stem} is the last block: nothing would be saved; name an earlier one with stem=….")
        grid = adapter.grid(self.image)
        self.pooled = PoolTokens(grid, c.stem_scale, adapter.prefix, self.interpolation)
        blocks[self.first].register_forward_pre_hook(self.pooled, with_kwargs=True)
        adapter.after_pooling(blocks[self.first :], self.pooled.size)
        at = c.stem or f"{adapter.inside(names[0])} (its input)"
        sizes = f"{format_resolution(grid)} → {format_resolution(self.pooled.size)} patch tokens"
        self.note("token pooling", at, f"{sizes}, {self.interpolation}, antialiased; upsampled after the last block")

    def merge(self) -> None:
        """Fewer tokens from block to block."""
        c = self.candidate
        if c.merge is not None:
            adapter = self.need_adapter("Merging tokens")
            blocks = adapter.blocks()[self.first :]
            if c.merge.by == PRUNE and not adapter.class_token:
                raise DownresError(
                    f"Pruning goes by the attention of a class token, {type(adapter.module).__name__} has none: merge instead "
                    f"({str(c.merge).replace(PRUNE, MERGE)})."
                )
            grid = self.pooled.size if self.pooled else adapter.grid(self.image)
            takes = removals(c.merge, grid[0] * grid[1], len(blocks))
            state = TokenState(takes, adapter.prefix, c.merge.by, self.pooled.size if self.pooled else None)
            adapter.merge(state, blocks)
            left = [grid[0] * grid[1]]
            for r in takes:
                left.append(left[-1] - r)
            what, how = "token merging", "most similar tokens merged"
            if c.merge.by == PRUNE:
                what, how = "token pruning", "tokens least attended to fused"
            self.note(
                what,
                f"{adapter.inside(adapter.block_names()[self.first])} and on",
                f"{how}, patch tokens {' → '.join(map(str, left))}; every patch gets its token after the last block",
            )
        if self.pooled is not None:
            assert self.adapter is not None
            self.adapter.blocks()[-1].register_forward_hook(UnpoolTokens(self.pooled))

    def shorten(self, original: nn.Module) -> None:
        """Fewer tokens, and a run where nothing else can tell whether that works: better now than when it serves."""
        c, adapter = self.candidate, self.adapter
        self.pool()
        checkpointing = adapter is not None and getattr(adapter.module, "grad_checkpointing", False)
        self.merge()
        if adapter is None or c == Candidate():
            return
        if checkpointing and not adapter.module.grad_checkpointing:
            self.note("gradient checkpointing", adapter.name, "turned off: a block that runs again would find other tokens")
        # What is around a transformer may expect its old grid, or read tokens between its blocks, where they have none.
        inside = adapter.name != ""
        if adapter.sure and not inside:
            return
        if c.resolution is not None or c.patch_size is not None:
            self._refuse_second(adapter)
        kind = type(self.small if adapter.sure else adapter.module).__name__
        then = "name another module with stem=…" if c.stem_scale != 1.0 else "reduce less"
        size = (self.native[0], *self.target)
        try:
            found = _output_shapes(self.small, size)
        except DownresError as error:
            if adapter.sure and not _runs(original, self.native):
                return  # the original takes something else than one image: this run tells nothing
            if error.__cause__ is None:
                raise  # one of our own sentences
            raise DownresError(
                f"{kind} cannot be made for '{c}' (it fails with: {said(error.__cause__)}): {then}, or give another resolution."
            ) from error
        named = c.stem_scale != 1.0 and c.stem is not None and self.pooled is None
        dense = any(len(shape) > 2 for shape in found)
        fewer = c.merge is not None or self.pooled is not None
        if not (named and not dense) and not (inside and dense and fewer):
            return
        whole = dataclasses.replace(c, merge=None, stem_scale=1.0, stem=None)
        with warnings.catch_warnings(action="ignore"):
            wanted = _output_shapes(reduce(original, whole, input_size=self.native), size)
        if found != wanted and named:
            raise DownresError(
                f"Resampling after {c.stem!r} changes the shape of what {type(self.small).__name__} returns, "
                f"{found} in place of {wanted}, so its output is no map (batch, channels, height, width): {then}."
            )
        if found != wanted:
            raise DownresError(
                f"{type(self.small).__name__} takes tokens out of {adapter.name} between its blocks, where '{c}' has changed "
                "their number: lower the resolution instead."
            )

    def answer(self, original: nn.Module, size: Size | str | None, interpolation: str, align_corners: bool | None) -> None:
        """Logits for every pixel get the size that the original's have. Of what else a network returns nothing is changed."""
        c, own = self.candidate, (self.native[-2], self.native[-1])
        if c == Candidate() and size is None:
            return
        if isinstance(size, str) and size != "input":
            raise DownresError(
                f"The size of logits is 'input' or (height, width), {size!r} is neither: give for example 'input'."
            )
        try:
            found: Answer | None = find_answer(original, (self.native[0], *own))
        except DownresError:  # features, or something else than one image goes in
            found = None
        if found is None or found.size is None:
            if size is not None:
                raise DownresError(
                    f"Only logits for every pixel (batch, classes, height, width) have a size, {type(original).__name__} "
                    "returns none: leave output_size out."
                )
            return
        # Of the original: resampling behind the embedding changes what the reduced network gives.
        strides = (1.0, 1.0) if size == "input" else (own[0] / found.size[0], own[1] / found.size[1])
        aligned = found.align_corners if align_corners is None else align_corners
        fixed = None if size is None or isinstance(size, str) else as_hw(size)
        full = FullSizeLogits(fixed, strides, interpolation, aligned, c.ragged != "error")
        self.small.register_forward_pre_hook(full.before, with_kwargs=True, prepend=True)
        self.small.register_forward_hook(full.after, with_kwargs=True)
        try:
            _output_shapes(self.small, (self.native[0], *own))
        except DownresError as error:
            if error.__cause__ is None:
                raise
            raise DownresError(
                f"{type(self.small).__name__} does not run as '{c}' ({said(error.__cause__)}): give sides that it divides."
            ) from error
        what = format_resolution(fixed) if fixed else f"the size of the {'input' if size else 'original'}"
        self.note("logits upsample", "", f"to {what}, {interpolation}, align_corners={aligned}")

    def _refuse_second(self, adapter: Adapter) -> None:
        """Another size of image or patch reaches one transformer alone."""
        for other in library_transformers(self.small):
            if other.name != adapter.name and other.image is not None:
                raise DownresError(
                    f"{type(self.small).__name__} holds two transformers, {adapter.name} and {other.name}, and only the first "
                    "would be made for another size: reduce each by itself and put them together again."
                )


def _runs(model: nn.Module, native: tuple[int, ...]) -> bool:
    adapter = find_adapter(model)
    size = (adapter.image if adapter is not None else None) or native[-2:]
    try:
        _output_shapes(model, (native[0], *size))
    except DownresError:
        return False
    return True


def _output_shapes(model: nn.Module, input_size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of all tensors that the model returns."""

    @contextlib.contextmanager
    def watch(copied: nn.Module, x: Tensor) -> Iterator[list[tuple[int, ...]]]:
        seen: list[tuple[int, ...]] = []
        copied.register_forward_hook(
            lambda _m, _args, out: seen.extend(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor))
        )
        yield seen

    return fake_run(model, input_size, watch)


def _geometry(adapter: Adapter) -> str:
    words = [f"{format_resolution(adapter.image)} px"] if adapter.image else []
    words += [f"patches of {format_resolution(adapter.patch)} px"] if adapter.patch else []
    return " in ".join(words)


def _replaced(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    if name == "":
        return new
    model.set_submodule(name, new)
    return model


def _named(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name not in modules or name == "":
        near = difflib.get_close_matches(name, modules, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"its first modules are {', '.join(list(modules)[1:6])}."
        raise DownresError(f"The model has no module {name!r}: {hint}")
    return modules[name]
