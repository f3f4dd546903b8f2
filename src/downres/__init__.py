"""downres: compress vision models by letting them look at fewer pixels."""

from .artifact import Finding, Prediction, check, predict
from .data import Dataset, Fold, Images, from_arrays, open_folder
from .demo import demo
from .errors import DownresError
from .families import Model, load_model, with_preprocessing
from .measure.cost import CONVENTION, measure_cost
from .measure.latency import measure_latency
from .records import Budget, Candidate, Change, Cost, Drop, Latency, Preprocessing, Quality, Recovery, Result, Rung
from .reductions import Reduction, reduce
from .search import Run, costs, curve, evaluate, load_run, recover, search, write_report

__all__ = [
    # the verbs
    "reduce", "measure_cost", "measure_latency", "evaluate", "recover", "costs", "curve", "search", "demo",
    "check", "predict", "write_report",
    # models and data
    "load_model", "with_preprocessing", "Model", "open_folder", "from_arrays", "Dataset", "Images", "Fold",
    # records
    "Candidate", "Budget", "Cost", "Latency", "Quality", "Drop", "Preprocessing", "Recovery", "Rung", "Result", "Run",
    "Change", "Reduction", "Finding", "Prediction", "load_run", "CONVENTION", "DownresError",
]  # fmt: skip
