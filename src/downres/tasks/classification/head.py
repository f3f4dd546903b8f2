"""Head refit: the final linear layer fitted anew on the features that the network gives at the target resolution."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ...errors import DownresError
from ...recovery.features import Head
from ..vectors import folded, one_thread, standardised

STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Values of scikit-learn's C (inverse L2 strength, on standardised features) that are tried on tuning images."""


def fit_head(features: np.ndarray, labels: np.ndarray, outputs: int, strength: float) -> Head:
    """Multinomial logistic regression with an L2 penalty on standardised features, folded back into one linear layer.

    features (n, F) float32, labels (n,) in 0…outputs-1. Deterministic. Raises DownresError when a class has no image.
    """
    if why := why_not(labels, outputs):
        raise DownresError(f"No head can be fitted, {why}: give images of every class.")
    inputs, mean, scale = standardised(features)
    model = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
    with warnings.catch_warnings(), one_thread():
        # 300 steps are plenty for a regularised fit; whether it suffices is measured on tuning images anyway.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(inputs, labels)
    weight, bias = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if outputs == 2 and len(weight) == 1:
        # scikit-learn keeps one row for two classes; softmax over (-z/2, z/2) is its sigmoid of z.
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return folded(weight, bias, mean, scale)


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log likelihood, in nats, of labels (n,) under softmax of logits (n, K)."""
    shifted = logits - logits.max(1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]).mean())


def why_not(labels: np.ndarray, outputs: int) -> str:
    """Why a head cannot be fitted on images with these labels, or '' when it can."""
    missing = outputs - len(np.unique(labels))
    return f"{missing} of {outputs} classes have no training image" if missing else ""
