"""downres: compress vision models by letting them look at fewer pixels."""

from typing import TYPE_CHECKING

from .lazy import lazy

if TYPE_CHECKING:
    from .artifacts import Embedded, Finding, check, embed, predict
    from .axes import Axes
    from .errors import DownresError
    from .families import Model, load_model, with_preprocessing
    from .images import Fold, Images
    from .measuring.cost import CONVENTION, measure_cost
    from .measuring.latency import measure_latency
    from .measuring.training_cost import measure_training_cost
    from .models.regseg import regseg
    from .paper.running import Reproduction, reproduce
    from .records import (
        Budget,
        Candidate,
        Change,
        Cost,
        Dense,
        Drop,
        Latency,
        Merge,
        Preprocessing,
        Record,
        Recovery,
        Result,
        Rung,
        Score,
        TrainingCost,
    )  # fmt: skip
    from .recovery.training import Training
    from .reduction import Reduction, reduce, token_map
    from .reductions.dense import Segmenter
    from .searching.costs import Costs, costs
    from .searching.curve import Curve, curve
    from .searching.demo import demo
    from .searching.doctor import Diagnosis, doctor
    from .searching.live import Watch, watch
    from .searching.prepare import Measuring
    from .searching.results import Run, load_run
    from .searching.run import search
    from .searching.several import Switchable, switchable
    from .searching.single import evaluate, recover
    from .searching.view import write_report
    from .tasks import Arrays, Question, Task
    from .tasks.agreement.photos import Photos, open_photos
    from .tasks.agreement.task import AgreementQuality, EmbeddingQuality
    from .tasks.classification.archives import open_archives
    from .tasks.classification.folders import Dataset, from_arrays, open_folder
    from .tasks.classification.quality import Quality
    from .tasks.classification.task import Prediction
    from .tasks.multilabel.quality import MultilabelQuality
    from .tasks.regression.task import RegressionQuality
    from .tasks.segmentation.masks import MaskDataset, MaskFolder, find_masks, open_masks
    from .tasks.segmentation.quality import SegmentationQuality
    from .tasks.segmentation.task import MaskPrediction

__all__ = [
    # the verbs
    "reduce", "token_map", "measure_cost", "measure_training_cost", "measure_latency", "evaluate", "recover", "costs", "curve",
    "search", "switchable", "reproduce", "demo", "doctor", "check", "embed", "predict", "write_report", "watch",
    # groups of their options
    "Axes", "Budget", "Question", "Measuring", "Training",
    # models and data
    "load_model", "with_preprocessing", "Model", "open_folder", "open_archives", "from_arrays", "Dataset", "Images", "Fold",
    "find_masks", "open_masks", "open_photos", "Photos", "MaskFolder", "MaskDataset", "Segmenter", "regseg",
    # tasks
    "Task", "Arrays",
    # records
    "Candidate", "Merge", "Cost", "TrainingCost", "Latency", "Score", "Quality", "SegmentationQuality", "MultilabelQuality",
    "RegressionQuality", "AgreementQuality", "EmbeddingQuality", "Dense", "Drop", "Preprocessing",
    "Record", "Recovery", "Rung", "Result", "Run", "Switchable", "Curve", "Costs", "Diagnosis", "Change", "Reduction",
    "Reproduction", "Watch", "Finding", "Embedded", "Prediction", "MaskPrediction", "load_run", "CONVENTION", "DownresError",
]  # fmt: skip

# Importing torch, timm and the runtimes takes seconds; a name is imported when it is first used, so that
# `downres --help` and a mistyped option answer at once. The imports above say the same to type checkers.
_HOMES = {
    "artifacts": ("Embedded", "Finding", "check", "embed", "predict"),
    "axes": ("Axes",),
    "errors": ("DownresError",),
    "families": ("Model", "load_model", "with_preprocessing"),
    "images": ("Fold", "Images"),
    "measuring.cost": ("CONVENTION", "measure_cost"),
    "measuring.training_cost": ("measure_training_cost",),
    "measuring.latency": ("measure_latency",),
    "models.regseg": ("regseg",),
    "paper.running": ("Reproduction", "reproduce"),
    "records": (
        "Budget", "Candidate", "Change", "Cost", "Dense", "Drop", "Latency", "Merge", "Preprocessing", "Record", "Recovery",
        "Result", "Rung", "Score", "TrainingCost",
    ),
    "reduction": ("Reduction", "reduce", "token_map"),
    "reductions.dense": ("Segmenter",),
    "searching.costs": ("Costs", "costs"),
    "searching.curve": ("Curve", "curve"),
    "searching.demo": ("demo",),
    "searching.doctor": ("Diagnosis", "doctor"),
    "recovery.training": ("Training",),
    "searching.live": ("Watch", "watch"),
    "searching.prepare": ("Measuring",),
    "searching.results": ("Run", "load_run"),
    "searching.run": ("search",),
    "searching.several": ("Switchable", "switchable"),
    "searching.single": ("evaluate", "recover"),
    "searching.view": ("write_report",),
    "tasks": ("Arrays", "Question", "Task"),
    "tasks.agreement.photos": ("Photos", "open_photos"),
    "tasks.agreement.task": ("AgreementQuality", "EmbeddingQuality"),
    "tasks.multilabel.quality": ("MultilabelQuality",),
    "tasks.regression.task": ("RegressionQuality",),
    "tasks.classification.archives": ("open_archives",),
    "tasks.classification.folders": ("Dataset", "from_arrays", "open_folder"),
    "tasks.classification.quality": ("Quality",),
    "tasks.classification.task": ("Prediction",),
    "tasks.segmentation.masks": ("MaskDataset", "MaskFolder", "find_masks", "open_masks"),
    "tasks.segmentation.quality": ("SegmentationQuality",),
    "tasks.segmentation.task": ("MaskPrediction",),
}  # fmt: skip
__getattr__, __dir__ = lazy(__name__, _HOMES)
