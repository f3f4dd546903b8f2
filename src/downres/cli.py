"""The command line: each command parses its options, makes one library call and prints one result."""

import atexit
import contextlib
import difflib
import gc
import importlib.metadata
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from .errors import NO_SPACE, DownresError, shown
from .lazy import no_collector
from .parse import floats, format_quantity, format_resolution, fraction, parse_quantity, parse_resolutions, refuse_missing
from .record import plain, write_json
from .techniques import RESOLUTION, Technique, techniques

# torch, timm and the runtimes take seconds to import: `--help` and a mistyped option must not wait for them,
# so every command imports what it calls.

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",  # options under headed groups
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RAY = "--ray"

# An option under each headed group of `--help`.
_allowed = partial(typer.Option, rich_help_panel="What is allowed")
_try = partial(typer.Option, rich_help_panel="What to try")
_model = partial(typer.Option, rich_help_panel="Model and preprocessing")
_data = partial(typer.Option, rich_help_panel="Task and data")
_measure = partial(typer.Option, rich_help_panel="How to measure")

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, torchvision:NAME, transformers:FOLDER, smp:ARCH/ENCODER, regseg:NAME or path/to/file.py:function.",
    ),
]
DataOption = Annotated[
    str,
    _data(
        "--data",
        metavar="DIR",
        help="Folder of class folders, with train/ and val/ or one to be split, ImageNet's layout; images and masks "
        "(Cityscapes, CamVid, Pascal VOC, ADE20K, pairs of folders); images beside --labels; WebDataset shards, ImageNet's "
        "tars or parquet, as a folder or 'shards-{000..146}.tar'; or only images, for agreement.",
    ),
]
WeightsOption = Annotated[Path | None, _model("--weights", help="A .safetensors or .pth file (read with weights_only=True).")]
NativeOption = Annotated[
    str | None,
    _model("--native-resolution", metavar="N|HxW", help="Resolution the original is used at; default: its own configuration."),
]
MeanOption = Annotated[str | None, _model("--mean", help="Per channel, on 0…1 (see --scale): 0.485,0.456,0.406.")]
StdOption = Annotated[str | None, _model("--std", help="Per channel, on 0…1 (see --scale): 0.229,0.224,0.225.")]
InterpolationOption = Annotated[str | None, _model("--interpolation", help="bilinear or bicubic.")]
CropOption = Annotated[
    float | None, _model("--crop-ratio", help="Side of the centre crop over the resized short side, above 0 to 1.")
]
CandidateOption = Annotated[
    list[str] | None,
    _try("--candidate", metavar="TEXT", help="One more, in any combination: '168 merge4', '224 patch28'. Repeat it."),
]
RaggedOption = Annotated[
    str, _try("--ragged", help="Where patches do not divide the input: error, floor (cut) or pad (zeros).")
]
FitOption = Annotated[
    str | None,
    _model(
        "--fit", help="Of a whole picture: crop, stretch or pad; default: as the model has it, never crop for segmentation."
    ),
]
OrderOption = Annotated[
    str | None, _model("--channel-order", help="Of the network's input, and of mean and std: rgb or bgr (OpenCV's).")
]
ScaleOption = Annotated[
    str | None,
    _model("--scale", metavar="1|1/255", help="What pixels are multiplied by before mean and std; 1 leaves 0…255."),
]
AntialiasOption = Annotated[
    bool | None,
    _model("--antialias/--no-antialias", help="Whether pictures are filtered when they get smaller; OpenCV's are not."),
]
TaskOption = Annotated[
    str | None,
    _data(
        "--task",
        metavar="NAME",
        help="classification, segmentation, multilabel, regression, agreement or path/to/file.py:Class; default: by network.",
    ),
]
LabelsOption = Annotated[
    Path | None, _data("--labels", metavar="FILE", help="CSV or JSON of labels beside a folder of images, a row an image.")
]
CompareOption = Annotated[
    str | None, _data("--compare", help="Of agreement: classes, embeddings or masks; default: as the network tells.")
]
OutputIndexOption = Annotated[
    str | None,
    _data(
        "--output-index",
        metavar="I|NAME",
        help="Which of several outputs of the network is judged; default: the one that fits the data, if only one does.",
    ),
]
IgnoreOutputOption = Annotated[
    int | None,
    _data("--ignore-output", metavar="I", help="Output of a segmentation network for pixels without a class, left out."),
]
ClassesOption = Annotated[
    Path | None,
    _data("--classes", metavar="FILE", help="Names of the masks' classes, one a line, with their colours: sky 128 128 128."),
]
LabelSizeOption = Annotated[
    str | None,
    _data(
        "--label-size",
        metavar="HxW",
        help="Size of a segmentation network's answer; default: the masks', for cost the input's.",
    ),
]
OutputOption = Annotated[
    str, _data("--output", help="What a segmentation network hands out at that size: logits, or classes (least memory).")
]
UpsamplingOption = Annotated[str, _data("--upsampling", help="Of a segmentation network's logits: bilinear or bicubic.")]
SnapOption = Annotated[bool, _try("--snap/--no-snap", help="Take --resolution to multiples of the network's stride.")]
JointOption = Annotated[
    int | None,
    _try(
        "--joint",
        metavar="N",
        help="Try the axes in all combinations, of more than N those that Optuna chooses on tuning images.",
    ),
]
ValFractionOption = Annotated[
    float | None,
    _measure(
        "--val-fraction", help="Part of one undivided folder that is kept for the proof; default: half, for curve all of it."
    ),
]
RuntimeOption = Annotated[str, _measure("--runtime", help="onnxruntime, openvino or torch; with a device: onnxruntime:cuda.")]
SearchRuntimeOption = Annotated[
    str | None,
    _measure(
        "--runtime",
        metavar="NAME,NAME",
        help="onnxruntime, openvino, torch, with a device (onnxruntime:cuda), or several, the original in the first; default: "
        "onnxruntime, and torch where the original cannot be exported.",
    ),
]
ThreadsOption = Annotated[int | None, _measure("--threads", help="Threads of the runtime; default: all cores available.")]
CacheOption = Annotated[
    float | None,
    _measure("--cache-gb", metavar="GB", help="Of decoded images kept on disk, at most; default: half of what is free there."),
]
TrainImagesOption = Annotated[
    int | None,
    _measure("--train-images", metavar="N", help="Opened to fit and to train on, at most; default: 10000, with masks 400."),
]
EpochsOption = Annotated[int, _try("--epochs", help="Of a training: passes over the training images.")]
LearningRateOption = Annotated[float, _try("--learning-rate", help="Of a training, the highest.")]
TrainOption = Annotated[
    list[str] | None,
    _try("--train", metavar="NAME=VALUE", help="More of how it trains, see `Training`: optimizer=sgd, mixup=0.2. Repeat it."),
]
MaxMinutesOption = Annotated[float | None, _allowed("--max-minutes", help="Of one training, which then has fewer epochs.")]
FitHeadOption = Annotated[bool, _try("--fit-head", help="Replace the classifier by one fitted for the data's classes.")]
ConfidenceOption = Annotated[float, _measure("--confidence", help="Of the proof, for all candidates together.")]
SeedOption = Annotated[int, _measure("--seed", help="Of splits and folds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on standard output instead of tables.")]


class _Output(Console):
    """A standard stream, as wide as it is when it is printed on. A file or a pipe has no width: no line there is broken."""

    @property  # type: ignore[misc]  # asked, never set
    def size(self) -> ConsoleDimensions:
        unknown = (10_000, 24)
        with contextlib.suppress(OSError, ValueError):  # errors go to a terminal where the output goes to a pipe
            unknown = os.get_terminal_size(self.file.fileno())
        return ConsoleDimensions(*shutil.get_terminal_size(unknown))


PARENT = "DOWNRES_WATCHED_BY"
"""Of the environment of a page that belongs to a search: that one's process."""
out = _Output(highlight=False)
err = _Output(stderr=True, highlight=False)


def _say(console: Console, text: str, style: str = "", soft_wrap: bool = False) -> None:
    """A line that may hold names from outside: nothing in it acts on the terminal, nothing is read as markup."""
    console.print(Text(shown(text), style), soft_wrap=soft_wrap)


class _Trying:
    """A command whose options are those of the techniques too, in front of --candidate; they come as `**tried`, by keyword.

    The signature, which typer reads when the program starts, is made when it is read: a technique that is registered later
    has its option too. untrained: also techniques whose accuracy cannot be measured.
    """

    def __init__(self, command: Callable[..., None], untrained: bool) -> None:
        self.command, self.untrained = command, untrained
        self.__name__, self.__doc__, self.__annotations__ = command.__name__, command.__doc__, {}

    def __call__(self, **given: Any) -> None:
        self.command(**given)

    @property
    def __signature__(self) -> inspect.Signature:
        own = [p for p in inspect.signature(self.command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        at = [p.name for p in own].index("candidate")
        # Costs, which no weights are needed for, are those of networks, whatever files these become.
        known = [t for t in techniques() if t.option]
        options = [_option(t) for t in known if (not t.in_file if self.untrained else t.measurable)]
        return inspect.Signature([*own[:at], *options, *own[at:]])


def _option(t: Technique) -> inspect.Parameter:
    """One technique as an option: a text, or a flag where it has nothing to choose from."""
    kind, default, shown = (str | None, None, t.metavar) if t.metavar else (bool, False, None)
    told = Annotated[kind, _try(t.option, metavar=shown, help=t.help)]  # type: ignore[valid-type]
    return inspect.Parameter(t.keyword, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=told)


def _trying(untrained: bool = False) -> Callable[[Callable[..., None]], _Trying]:
    return lambda command: _Trying(command, untrained)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"downres {importlib.metadata.version('downres')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compress vision models by letting them look at fewer pixels: search, recover, prove, ship."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("demo"),
    max_drop: Annotated[float, _allowed("--max-drop", help="Points of top-1 that may be lost.")] = 2.0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """The main job on real photographs of solar cells and EfficientNet-Lite0, all installed by pip."""
    from .searching.demo import demo as run_demo

    with _progress() as progress:
        run = run_demo(folder, max_drop=max_drop, threads=threads, command=_command(), progress=progress)
    _print_run(run, as_json)


@app.command()
@_trying()
def search(
    model: ModelArgument,
    data: DataOption,
    folder: Annotated[
        Path, typer.Option("--out", metavar="RUN", help="Folder of the run; the same command goes on where it was.")
    ] = Path("run"),
    max_drop: Annotated[
        float, _allowed("--max-drop", help="That may be lost, proven: points of top-1 or mIoU, or in the unit of a regression.")
    ] = 1.0,
    max_latency_ms: Annotated[float | None, _allowed("--max-latency-ms", help="Median of one pass, milliseconds.")] = None,
    max_macs: Annotated[str | None, _allowed("--max-macs", metavar="500M")] = None,
    max_memory: Annotated[
        str | None, _allowed("--max-memory", metavar="20MB", help="Peak activation memory of one image.")
    ] = None,
    max_size: Annotated[str | None, _allowed("--max-size", metavar="5MB", help="Of the file that is shipped.")] = None,
    max_flips: Annotated[
        float | None,
        _allowed("--max-flips", metavar="PERCENT", help="Images that may get another answer, proven like the drop."),
    ] = None,
    candidate: CandidateOption = None,
    ragged: RaggedOption = "error",
    recover: Annotated[
        str | None,
        _try(
            "--recover",
            metavar="HOW",
            help="How far up the ladder: none, calibrate, refit (the default), distill (trained without labels), finetune "
            "(with labels), train (also in 8 bits). Training takes minutes to hours.",
        ),
    ] = None,
    rungs: Annotated[
        str | None,
        _try(
            "--rungs",
            help="The rungs themselves instead, from crop,batchnorm,head,distill,fixres,finetune, for int8 also "
            "ranges,layers,qat; 'none' only lowers.",
        ),
    ] = None,
    epochs: EpochsOption = 20,
    learning_rate: LearningRateOption = 1e-3,
    train: TrainOption = None,
    max_minutes: MaxMinutesOption = None,
    minimize: Annotated[
        str | None,
        _allowed(
            "--minimize",
            help="What cheapest means: macs, memory, latency or size; default: macs, with --precision or several "
            "runtimes latency.",
        ),
    ] = None,
    task: TaskOption = None,
    labels: LabelsOption = None,
    compare: CompareOption = None,
    output_index: OutputIndexOption = None,
    ignore_output: IgnoreOutputOption = None,
    fit_head: FitHeadOption = False,
    folds: Annotated[int | None, _measure("--folds", help="Cross-fit one folder: every image is a proof image once.")] = None,
    val_fraction: ValFractionOption = None,
    confidence: ConfidenceOption = 0.95,
    sequential: Annotated[
        bool | None,
        _measure(
            "--sequential/--exhaustive",
            help="Show each candidate only as many proof images as its verdict needs, or all; default: all of fewer than 2000.",
        ),
    ] = None,
    weights: WeightsOption = None,
    native_resolution: NativeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_ratio: CropOption = None,
    classes: ClassesOption = None,
    label_size: LabelSizeOption = None,
    output: OutputOption = "logits",
    upsampling: UpsamplingOption = "bilinear",
    fit: FitOption = None,
    channel_order: OrderOption = None,
    scale: ScaleOption = None,
    antialias: AntialiasOption = None,
    snap: SnapOption = False,
    joint: JointOption = None,
    live: Annotated[
        bool, typer.Option("--live", help="Serve a page of the run as it goes while it searches, see downres watch.")
    ] = False,
    embed_preprocessing: Annotated[
        bool, _model("--embed-preprocessing", help="Ship also a file that takes pictures of any size, see downres embed.")
    ] = False,
    runtime: SearchRuntimeOption = None,
    threads: ThreadsOption = None,
    latency_batch: Annotated[int, _measure("--latency-batch", help="Images in the pass that is timed.")] = 1,
    ray: Annotated[
        str | None,
        _measure(
            RAY,
            metavar="[ADDRESS]",
            help="Measure candidates on a Ray cluster: auto, the one that this machine is part of, or HOST:PORT; alone: one of "
            "this machine, for the length of the search.",
        ),
    ] = None,
    latency_node: Annotated[
        str | None,
        _measure(
            "--latency-node",
            metavar="NODE",
            help="Time on that node of the cluster, not here: its name, address or id, or a resource of nodes of a kind.",
        ),
    ] = None,
    cache_gb: CacheOption = None,
    train_images: TrainImagesOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    **tried: Any,
) -> None:
    """Find the cheapest way to look at less whose drop is proven to be within --max-drop, and ship the model."""
    tries = _axes(tried, None, candidate, ragged)
    macs = parse_quantity(max_macs, "--max-macs") if max_macs else None
    memory = parse_quantity(max_memory, "--max-memory") if max_memory else None
    from .searching.run import search as run_search

    loaded = _load(
        model, weights, native_resolution, mean, std, scale, interpolation=interpolation, crop_ratio=crop_ratio, fit=fit,
        channel_order=channel_order, antialias=antialias, data=_checkable(data, task),
    )  # fmt: skip
    with _live(folder, task) if live else contextlib.nullcontext(), _progress() as progress:
        run = run_search(
            loaded, data, max_drop=max_drop, max_macs=macs, max_memory_bytes=memory, max_latency_ms=max_latency_ms,
            max_size_bytes=parse_quantity(max_size, "--max-size") if max_size else None, max_flips=max_flips,
            latency_batch=latency_batch, tries=tries, snap=snap, joint=joint,
            rungs=None if rungs is None else tuple(r for r in rungs.split(",") if r != "none"), recover=recover,
            training=_training(train or [], epochs=epochs, learning_rate=learning_rate, max_minutes=max_minutes),
            minimize=minimize, fit_head=fit_head, folds=folds,
            val_fraction=val_fraction, confidence=confidence, sequential=sequential, runtime=runtime, threads=threads,
            out=folder, seed=seed, cache_gb=cache_gb, train_images=train_images, task=_task(task), labels=_text(labels),
            compare=compare,
            classes=_text(classes), output_index=output_index, ignore_output=ignore_output,
            label_size=_size(label_size), output=output, upsampling=upsampling, embed_preprocessing=embed_preprocessing,
            command=_command(), progress=progress, ray=ray, latency_node=latency_node,
        )  # fmt: skip
    _print_run(run, as_json)


@app.command()
def switchable(
    model: ModelArgument,
    data: DataOption,
    resolutions: Annotated[
        str, _try("--resolution", metavar="N,N,…", help="Two or more that one model shall run at: 224,160,128, or 96:224:32.")
    ],
    folder: Annotated[
        Path, typer.Option("--out", metavar="RUN", help="Folder of the run; the same command goes on where it was.")
    ] = Path("run"),
    max_drop: Annotated[
        float, _allowed("--max-drop", help="For the verdicts: points of top-1 or mIoU, or in the unit of a regression.")
    ] = 1.0,
    own_heads: Annotated[bool, _try("--own-heads", help="Give each resolution a last layer of its own.")] = False,
    epochs: EpochsOption = 20,
    learning_rate: LearningRateOption = 1e-3,
    train: TrainOption = None,
    max_minutes: MaxMinutesOption = None,
    task: TaskOption = None,
    labels: LabelsOption = None,
    compare: CompareOption = None,
    output_index: OutputIndexOption = None,
    ignore_output: IgnoreOutputOption = None,
    fit_head: FitHeadOption = False,
    val_fraction: ValFractionOption = None,
    confidence: ConfidenceOption = 0.95,
    weights: WeightsOption = None,
    native_resolution: NativeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_ratio: CropOption = None,
    classes: ClassesOption = None,
    label_size: LabelSizeOption = None,
    output: OutputOption = "logits",
    upsampling: UpsamplingOption = "bilinear",
    fit: FitOption = None,
    channel_order: OrderOption = None,
    scale: ScaleOption = None,
    antialias: AntialiasOption = None,
    threads: ThreadsOption = None,
    cache_gb: CacheOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train one model for several resolutions, without labels, and ship them in one folder that has its weights once."""
    from .searching.several import switchable as run_switchable

    loaded = _load(
        model, weights, native_resolution, mean, std, scale, interpolation=interpolation, crop_ratio=crop_ratio, fit=fit,
        channel_order=channel_order, antialias=antialias, data=_checkable(data, task),
    )  # fmt: skip
    with _progress() as progress:
        found = run_switchable(
            loaded, data, parse_resolutions(resolutions), max_drop=max_drop, confidence=confidence, own_heads=own_heads,
            training=_training(train or [], epochs=epochs, learning_rate=learning_rate, max_minutes=max_minutes),
            fit_head=fit_head, val_fraction=val_fraction, threads=threads, out=folder, seed=seed, cache_gb=cache_gb,
            task=_task(task), labels=_text(labels), compare=compare, classes=_text(classes),
            output_index=output_index, ignore_output=ignore_output,
            label_size=_size(label_size), output=output, upsampling=upsampling,
            command=_command(), progress=progress,
        )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
        return
    from .reports import tables, terminal

    _say(out, found.data)
    out.print(terminal.told(tables.candidates(found.original, found.results), out.width))
    _print_timed(found.original.latency)
    many, one = (format_quantity(size, "B") for size in (found.file_bytes, found.single_bytes))
    _say(out, f"{found.artifact}: {many} for all resolutions, the original's file is {one}", soft_wrap=True)
    _print_notes(found.notes)


@app.command()
@_trying()
def curve(
    model: ModelArgument,
    data: DataOption,
    candidate: CandidateOption = None,
    ragged: RaggedOption = "error",
    max_drop: Annotated[float, _allowed("--max-drop", help="Points, for the verdict of each resolution alone.")] = 1.0,
    task: TaskOption = None,
    labels: LabelsOption = None,
    compare: CompareOption = None,
    output_index: OutputIndexOption = None,
    ignore_output: IgnoreOutputOption = None,
    val_fraction: ValFractionOption = None,
    weights: WeightsOption = None,
    native_resolution: NativeOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    interpolation: InterpolationOption = None,
    crop_ratio: CropOption = None,
    classes: ClassesOption = None,
    label_size: LabelSizeOption = None,
    output: OutputOption = "logits",
    upsampling: UpsamplingOption = "bilinear",
    fit: FitOption = None,
    channel_order: OrderOption = None,
    scale: ScaleOption = None,
    antialias: AntialiasOption = None,
    snap: SnapOption = False,
    runtime: RuntimeOption = "torch",
    threads: ThreadsOption = None,
    cache_gb: CacheOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    **tried: Any,
) -> None:
    """Quality against resolution, patches and tokens, with the model's own weights: no search, no recovery."""
    tries = _axes(tried, (), candidate, ragged)
    if tries.is_empty:
        tries = tries.replaced({RESOLUTION.keyword: None})  # nothing asked for: from the model's own down
    from .searching.curve import curve as run_curve

    loaded = _load(
        model, weights, native_resolution, mean, std, scale, interpolation=interpolation, crop_ratio=crop_ratio, fit=fit,
        channel_order=channel_order, antialias=antialias, data=_checkable(data, task),
    )  # fmt: skip
    with _progress() as progress:
        found = run_curve(
            loaded, data, tries=tries, snap=snap, max_drop=max_drop, val_fraction=val_fraction,
            runtime=runtime, threads=threads, seed=seed, cache_gb=cache_gb, progress=progress,
            task=_task(task), labels=_text(labels), compare=compare, classes=_text(classes),
            output_index=output_index, ignore_output=ignore_output,
            label_size=_size(label_size), output=output, upsampling=upsampling,
        )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
        return
    from .reports import tables, terminal

    _say(out, found.data)
    _say(out, _preprocessing_words(found.preprocessing))
    out.print(terminal.told(tables.candidates(found.original, found.results), out.width))
    _print_notes(found.notes)


@app.command()
@_trying(untrained=True)
def cost(
    model: ModelArgument,
    candidate: CandidateOption = None,
    ragged: RaggedOption = "error",
    batch_size: Annotated[int, _measure("--batch-size", help="Images in one pass.")] = 1,
    training: Annotated[
        bool, _measure("--training", help="Also a training step: MACs and peak memory, forward, backward and optimizer.")
    ] = False,
    optimizer: Annotated[str, _measure("--optimizer", help="Of --training: adamw or sgd.")] = "adamw",
    label_size: LabelSizeOption = None,
    output: OutputOption = "logits",
    upsampling: UpsamplingOption = "bilinear",
    output_index: OutputIndexOption = None,
    weights: WeightsOption = None,
    native_resolution: NativeOption = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE.html", help="Draw the families: MACs against memory.")
    ] = None,
    as_json: JsonOption = False,
    **tried: Any,
) -> None:
    """MACs, parameters and peak activation memory of families of candidates; needs no data and no weights."""
    tries = _axes(tried, (), candidate, ragged)
    if tries.is_empty and not any(tried.values()):
        tries = tries.replaced({RESOLUTION.keyword: None})  # nothing asked for: from the model's own down
    with no_collector():
        from .searching.costs import costs

    loaded = _load(model, weights, native_resolution, pretrained=False)
    answer: dict[str, Any] = {"label_size": _size(label_size), "output": output, "upsampling": upsampling}
    answer["output_index"] = output_index
    found = costs(loaded, tries=tries, batch_size=batch_size, training=optimizer if training else None, **answer)
    page = found.write_picture(picture) if picture else None
    if as_json:
        _print_json({**found.to_json(), **({"picture": str(page)} if page else {})})
        return
    from .reports import tables, terminal, words

    out.print(terminal.told(tables.families(found.rows), out.width))
    _say(out, f"For {words.count(batch_size, 'image')}. {found.convention}", "dim")
    kinds = ", ".join(f"{name.removeprefix('aten.')} ×{n}" for name, n in found.original.uncounted.items())
    _say(out, f"Not counted at {format_resolution(loaded.preprocessing.resolution)}: {kinds or 'nothing'}.", "dim")
    _print_notes(found.notes)
    if page:
        _say(out, f"Picture: {page}", soft_wrap=True)


@app.command()
def paper(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="An experiment; without one they are listed.")] = None,
    data: Annotated[
        str | None, _data("--data", metavar="DIR", help="Images to train on and to look at: what is missing in --out is run.")
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of all experiments; the same command goes on where it was.")
    ] = Path("paper"),
    table: Annotated[
        bool, typer.Option("--table", help="Print every network: its costs, its quality where it was run.")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="Write the figure with its tables, one HTML file.")
    ] = None,
    only: Annotated[str, _try("--only", metavar="PATTERN", help="Networks whose names match: '64-128-256-512*'.")] = "*",
    seeds: Annotated[str, _try("--seeds", metavar="N,N", help="Networks to train of each kind.")] = "0",
    scale: Annotated[
        float, _try("--scale", help="Of every size in pixels, patches included: 0.25 for a machine without a GPU.")
    ] = 1.0,
    grid: Annotated[
        bool, _try("--grid/--no-grid", help="Look at every size that the paper looks at, or only at a network's own.")
    ] = True,
    train: TrainOption = None,
    val_fraction: ValFractionOption = None,
    threads: ThreadsOption = None,
    cache_gb: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """The experiments of the paper (arXiv 2504.03749): list them, run one, print its table, draw its figure."""
    from .paper import figures
    from .reports import terminal

    if name is None:
        if as_json:
            _print_json({"experiments": figures.listed()})
            return
        out.print(terminal.stacked(figures.listed(), ("name",), out.width))
        _say(out, "downres paper NAME says what it trains, how long that takes and what is known; --data DIR runs it.")
        return
    from .paper.running import reproduce

    with _progress() as progress:
        found = reproduce(
            name, data, folder if data is not None or folder.is_dir() else None, only=only, seeds=_whole_numbers(seeds),
            scale=scale, grid=grid, train=train or [], runtime="torch", val_fraction=val_fraction, threads=threads,
            cache_gb=cache_gb, progress=progress,
        )  # fmt: skip
    if not found.lines:  # a process that has trained along
        return
    if figure is not None:
        figures.write_figure(found, figure)
    if as_json:
        _print_json(found.to_json())
        return
    for line in figures.card(found):
        _say(out, line)
    if table or data is not None:
        out.print(terminal.stacked(figures.rows(found), ("network",), out.width))
    if figure is not None:
        _say(out, f"figure: {figure}", soft_wrap=True)


@app.command()
def doctor(
    model: ModelArgument,
    runtime: Annotated[
        str | None,
        _measure("--runtime", metavar="NAMES", help="onnxruntime,openvino,torch, with a device after a colon; default: all."),
    ] = None,
    resolution: Annotated[
        str | None, _model("--resolution", metavar="N|HxW", help="That it is used at; default: its own configuration.")
    ] = None,
    data: Annotated[
        str | None, _data("--data", metavar="DIR", help="Pictures, to compare the time to decode them with the network's.")
    ] = None,
    weights: WeightsOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """What wastes compute on this machine for this network, measured: sizes, types of numbers, runtimes, threads, decoding."""
    from .searching.doctor import doctor as diagnose

    loaded = _load(model, weights, resolution, pretrained=False, option="--resolution")
    with _progress() as progress:
        found = diagnose(loaded, runtimes=runtime, data=data, threads=threads, progress=progress)
    if as_json:
        _print_json(found.to_json())
        return
    from .reports import terminal, words

    size, python = "x".join(map(str, found.input_size)), found.versions["python"]
    _say(out, f"{found.model}, {size}, {format_quantity(found.cost.macs)} MACs. {found.hardware}, Python {python}.")
    rows: list[dict[str, str | Text]] = [
        {
            "runtime": f"{one.runtime} {one.latency.versions.get(one.runtime.partition(':')[0], '')}",
            "numbers": one.precision,
            "latency": f"{words.digits(one.latency.latency_ms)} ms",
            "10 to 90 %": words.spread(one.latency),
        }
        for one in found.timings
    ]
    out.print(terminal.stacked(rows, ("runtime", "numbers"), out.width))
    _say(out, found.verdict, "bold")
    out.print(terminal.findings([(as_options(one.text), one.gain, one.of) for one in found.findings]))
    _print_notes(found.notes)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN")], task: TaskOption = None, as_json: JsonOption = False) -> None:
    """Write RUN/report.html from what the run has measured so far."""
    from .searching.view import write_report

    _task(task)

    page = write_report(run)
    if as_json:
        _print_json({"report": str(page)})
    else:
        _say(out, f"Report: {page}", soft_wrap=True)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    port: Annotated[int, typer.Option("--port", help="Of the page, on this machine alone; 0: any that is free.")] = 0,
    task: TaskOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="What the page would show now as one JSON document, and no page.")
    ] = False,
) -> None:
    """A page that redraws as a run's measurements come: what it does now, what was decided and why, the picture, time left."""
    from .searching.live import watch as watch_run

    page = watch_run(run, port=port, task=_task(task))
    if as_json:
        page.close()
        _print_json(page.state())
        return
    if (parent := os.environ.get(PARENT)) is not None:  # of a search, however it ends
        page.end_with(int(parent))
    _say(out, f"Watching {run} at {page.address} (Ctrl-C ends it)", soft_wrap=True)
    out.file.flush()
    with contextlib.suppress(KeyboardInterrupt):
        page.serve()


@app.command()
def check(
    artifact: Annotated[Path, typer.Argument(metavar="RUN/best")],
    model: Annotated[
        str | None, typer.Option("--model", help="path/to/file.py:function, where the network came from one.")
    ] = None,
    data: Annotated[str | None, _data("--data", metavar="DIR", help="Where the proof images are now.")] = None,
    task: TaskOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove a shipped model: files unchanged, onnxruntime equal to torch on real images, the quality as stated."""
    from .artifacts import check as run_check

    findings = run_check(artifact, model=model, data=data, threads=threads, task=_task(task))
    if as_json:
        _print_json(
            {
                "artifact": str(artifact),
                "ok": all(f.ok is not False for f in findings),
                "findings": [f.to_json() for f in findings],
            }
        )
    else:
        for finding in findings:
            mark = {True: ("ok", "green"), False: ("WRONG", "red"), None: ("not checked", "yellow")}[finding.ok]
            out.print(Text.assemble(mark, shown(f" {finding.what}: {as_options(finding.detail)}")), soft_wrap=True)
    if any(f.ok is False for f in findings):
        raise typer.Exit(1)


@app.command()
def embed(
    artifact: Annotated[Path, typer.Argument(metavar="RUN/best")],
    data: Annotated[str | None, _data("--data", metavar="DIR", help="Where the proof images are now.")] = None,
    task: TaskOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write beside a shipped model one that has its preprocessing inside and takes pictures of any size, 8 bits a channel."""
    from .artifacts import embed as run_embed

    embedded = run_embed(artifact, data=data, threads=threads, task=_task(task))
    if as_json:
        _print_json(embedded.to_json())
    else:
        _say(out, f"{artifact / embedded.file}: {embedded}", soft_wrap=True)


@app.command()
def predict(
    artifact: Annotated[Path, typer.Argument(metavar="RUN/best")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes.")] = 5,
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the masks and overlays of a segmentation network go.")
    ] = Path("predictions"),
    task: TaskOption = None,
    limit_s: Annotated[float, typer.Option("--limit-s", help="Seconds that the model may take for one picture.")] = 60.0,
    resolution: Annotated[
        str | None,
        typer.Option("--resolution", metavar="N|HxW", help="Of a model for several; default: the largest."),
    ] = None,
    max_latency_ms: Annotated[
        float | None,
        typer.Option("--max-latency-ms", help="Instead: the largest that takes no longer, timed here before the pictures."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classes of pictures, their masks, or whatever the shipped model answers, by it alone."""
    from .artifacts import predict as run_predict

    predictions = run_predict(
        artifact, images, top=top, out=folder, task=_task(task), limit_s=limit_s, threads=threads,
        resolution=_size(resolution, "--resolution"), max_latency_ms=max_latency_ms,
    )  # fmt: skip
    if as_json:
        _print_json({"predictions": [p.to_json() for p in predictions]})
        return
    for prediction in predictions:
        _say(out, str(prediction), soft_wrap=True)


def main() -> None:
    """Entry point: exit codes 0 good, 1 a check failed, 2 bad input, 130 interrupted; never a traceback for those."""
    warnings.simplefilter("ignore")
    warnings.showwarning = lambda message, *_: _say(err, f"Note: {as_options(str(message))}")  # type: ignore[assignment]
    warnings.filterwarnings("default", module="downres")
    atexit.register(gc.freeze)  # else Python looks once more, for a second, for garbage in all of torch before it ends
    # Nobody reads the libraries' own chatter between a progress bar and a table.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # it retries aloud; we say in one sentence that it failed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows no ★
    try:
        code = app(_arguments(sys.argv[1:]), standalone_mode=False)  # an Exit comes back as its code; so does Ctrl-C, as 130
        if code == 130:
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except DownresError as error:
        _stop(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__ or error.__context__, EOFError):  # the option parser takes a cut file for Ctrl-D
            _stop("A file ends in the middle of what it should hold: get it again.", 2)
        _stop("Interrupted. What a search has measured is kept: the same command goes on where it was.", 130)
    except OSError as error:
        if error.errno in NO_SPACE:
            _stop(
                "The disk is full: free some space (or set TMPDIR to a larger disk) and run the same command again; "
                "nothing measured is lost.",
                2,
            )
        if isinstance(error, BrokenPipeError):
            # Whoever read the output has gone (`| head`): nothing is wrong, and nothing more can be said.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        _stop(f"Cannot use {error.filename or 'a file'} ({error.strerror or error}): choose another file or folder.", 2)
    except Exception as error:
        # Usage errors of the option parser carry a message and an exit code of their own.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():
            sys.exit(2)  # a command without its arguments: the help has been shown
        _stop(_usage(error), 2)


def _arguments(given: list[str]) -> list[str]:
    """As the option parser takes them, which knows no option that may stand alone or have a value, as `--ray` does."""
    told: list[str] = []
    for one, after in zip(given, [*given[1:], ""], strict=False):  # nothing is given where the list is empty
        told.append(one)
        if one == RAY and not re.fullmatch(r"auto|local|[a-z]+://\S+|[\w.\-\[\]:]+:\d+", after):
            told.append("local")
    return told


def _usage(error: Any) -> str:
    message = str(error.format_message()).rstrip(".")
    name = getattr(error, "option_name", None)
    context = getattr(error, "ctx", None)
    if name and context is not None:
        known = [option for parameter in context.command.params for option in parameter.opts]
        near = difflib.get_close_matches(name.strip("-"), [option.strip("-") for option in known], n=1, cutoff=0.7)
        message = f"There is no option {name}" + (f", did you mean --{near[0]}?" if near else "")
    where = context.command_path if context is not None else "downres"
    if "extra argument" in message and RAY in sys.argv:
        message += f"; a cluster's address behind {RAY} is HOST:PORT, auto or local"
    return f"{message}: see {where} --help." if not message.endswith("?") else message


def as_options(text: str) -> str:
    """A sentence of the library's with its arguments, which stand in backticks as in Python (`fit_head=True`), as options."""
    if "`" not in text:
        return text
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    options = {o[2:].replace("-", "_"): o for c in commands for p in c.params for o in p.opts if o.startswith("--")}
    options |= {t.keyword: t.option for t in techniques() if t.option}

    def option(found: re.Match[str]) -> str:
        name, _, value = found[1].partition("=")
        if name not in options:
            return found[0]
        return options[name] if value in ("", "True") else f"{options[name]} {value.strip(chr(39))}"

    return re.sub(r"`(\w+(?:=[^`]*)?)`", option, text)


def _stop(message: str, code: int) -> None:
    _say(err, as_options(message), "red", soft_wrap=True)
    sys.exit(code)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DownresError(
            f"Seeds are whole numbers with commas between them, {text!r} are not: give for example 0,1,2."
        ) from None


def _command() -> str:
    return shlex.join(["downres", *sys.argv[1:]])


def _load(
    model: str, weights: Path | None, native: str | None, mean: str | None = None, std: str | None = None,
    scale: str | None = None, pretrained: bool = True, option: str = "--native-resolution", data: str | None = None,
    **given: Any,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """The model as the options describe it. Options are read first: a typing error must not wait for weights. data: a folder
    that must be there.
    """
    natives = [None] if native is None else parse_resolutions(native)
    if len(natives) > 1:
        raise DownresError(f"{option} is one resolution, {native!r} are {len(natives)}: give for example 224.")
    given |= {
        "mean": tuple(floats(mean, "--mean")) if mean else None,
        "std": tuple(floats(std, "--std")) if std else None,
        "scale": fraction(scale, "--scale") if scale else None,
    }
    refuse_missing(data)
    with no_collector():
        from .families import load_model, with_preprocessing

        loaded = load_model(model, weights, pretrained=pretrained)
    return with_preprocessing(loaded, resolution=natives[0], **given)


def _checkable(data: str, task: str | None) -> str | None:
    """The data where they are a folder; what they are to a task of one's own, only that knows."""
    return data if task is None or ":" not in task else None


def _task(text: str | None) -> Any:
    """`--task`: a name, or the class in a file, which is run because the user names it."""
    if text is None or ".py:" not in text:
        return text
    from .families.generic import from_file

    return from_file(text, "task")


def _training(more: list[str], **given: Any) -> Any:
    from .recovery.training import Training

    return Training.parse(more, **given)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _size(text: str | None, option: str = "--label-size") -> Any:
    """One resolution, or None."""
    sizes = [None] if text is None else parse_resolutions(text)
    if len(sizes) > 1:
        raise DownresError(f"{option} is one size, {text!r} are {len(sizes)}: give for example 360x480.")
    return sizes[0]


def _axes(tried: dict[str, Any], default: tuple | None, candidate: list[str] | None, ragged: str) -> Any:
    """What to try, as the options say it; `default` for an axis that no option speaks of, 'none' for no variant along it."""
    from .axes import Axes

    axes: dict[str, Any] = {}
    for t in techniques():
        text = tried.get(t.keyword)
        axes[t.keyword] = default if not text else () if text == "none" else t.parse_option(text)
    return Axes.of(axes, candidates=candidate or (), ragged=ragged)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error; one line for each stage where that is no terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("starting", total=None)  # one task for all stages: its clock shows the time since the start
        last = ""

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal last
            if stage != last and not err.is_terminal:
                _say(err, f"{stage} ({total})")
            last = stage
            bar.update(task, description=shown(stage), completed=done, total=total)

        yield progress


@contextlib.contextmanager
def _live(run: Path, task: str | None) -> Iterator[None]:
    """`downres watch` in a process of its own, so that it takes nothing of what is timed but what it needs to be looked at."""
    if os.environ.get("RANK", "0") != "0":  # of several processes that train together the first has a page
        yield
        return
    command = [sys.executable, "-m", "downres", "watch", str(run), *(["--task", task] if task else [])]
    page = subprocess.Popen(command, stdout=2, env={**os.environ, PARENT: str(os.getpid())})  # on standard error
    try:
        yield
    finally:
        page.terminate()
        page.wait()


def _print_json(document: dict[str, Any]) -> None:
    text = write_json(plain(document), indent=1, ensure_ascii=False)
    text = re.sub("[\ud800-\udfff]", lambda found: shown(found[0]).replace("\\", "\\\\"), text)  # no UTF-8 has these
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # what is no UTF-8 gets plain ASCII
        text = write_json(json.loads(text), indent=1)
    print(text)


def _print_timed(latency: Any) -> None:
    from .reports import words

    if latency is not None:
        _say(out, f"Latency: median, {words.timed_on(latency)}.", "dim")


def _print_run(run: Any, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # of several processes that train together the first speaks
        return
    if as_json:
        _print_json(run.to_json())
        return
    from .records import Preprocessing
    from .reports import tables, terminal, words
    from .reports.interactions import interactions

    settings = run.settings
    _say(out, f"{run.data['description']} {run.data['licence']}".strip())
    _say(out, _preprocessing_words(Preprocessing.from_json(settings["preprocessing"])))
    for skipped in run.data["skipped"][:10]:
        _say(err, f"Skipped {skipped['path']}: {skipped['reason']}")
    if len(run.data["skipped"]) > 10:
        _say(err, f"… {len(run.data['skipped'])} images skipped, all listed in {run.folder / 'report.html'}")
    best = run.best and run.best.candidate
    out.print(terminal.told(tables.candidates(run.original, run.results, best), out.width))
    _print_timed(run.original.latency)
    _say(out, words.verdict(run.original, run.results, run.best, run.budget, run.task.score), "bold")
    for one in interactions(run.original, run.results, run.best)[:1]:
        _say(out, f"{words.label(one.candidate)}: {one.sentence}")
    _print_notes(run.notes)
    _say(out, f"Report: {run.folder / 'report.html'}", soft_wrap=True)
    if run.artifact:
        _say(out, f"Model:  {run.artifact}  (downres check {shlex.quote(str(run.artifact))})", soft_wrap=True)
        if embedded := run.embedded:
            _say(out, f"        {embedded.file} has its preprocessing inside: {embedded}", soft_wrap=True)


def _print_notes(notes: Any) -> None:
    for note in notes:
        _say(err, f"Note: {as_options(note)}.")


def _preprocessing_words(p: Any) -> str:
    from .reports import words

    unusual = f"{words.pixels(p)}, " if words.pixels(p) else ""
    return (
        f"Preprocessing ({p.source}): {format_resolution(p.resolution)} px, "
        f"{f'crop ratio {p.crop_ratio:.3g}' if p.fit == 'crop' else f'whole picture, {p.fit}'}, {p.interpolation}, "
        f"{'' if p.antialias else 'not antialiased, '}{unusual}"
        f"mean {words.channels(p.mean)}, std {words.channels(p.std)}"
    )
