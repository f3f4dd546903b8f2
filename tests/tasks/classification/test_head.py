"""Head refit against scikit-learn's own answers."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from downres.errors import DownresError
from downres.recovery.crop import crop_options
from downres.recovery.features import Head
from downres.tasks.classification.head import STRENGTHS, fit_head, log_loss, why_not


def problem(classes, n=600, width=20, spread=0.5, seed=0):
    """Clouds around `classes` centres, features of very different scales and offsets."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = rng.normal(size=(classes, width))[labels] + spread * rng.normal(size=(n, width))
    scales, offsets = 10.0 ** rng.uniform(-3, 2, width), rng.normal(size=width) * 10
    return ((features * 1.0 + offsets) * scales).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_recovers_a_separable_problem(classes):
    features, labels = problem(classes, spread=0.3)
    for strength in STRENGTHS:
        head = fit_head(features[:300], labels[:300], classes, strength)
        assert head.weight.shape == (classes, 20) and head.bias.shape == (classes,)
        assert head.weight.dtype == head.bias.dtype == np.float32
        assert (head(features[300:]).argmax(1) == labels[300:]).mean() > 0.97


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_folding_is_exact(classes):
    """The one linear layer gives the probabilities of standardisation followed by scikit-learn's fit."""
    features, labels = problem(classes, spread=2.0)
    head = fit_head(features, labels, classes, 0.01)
    wide = features.astype(np.float64)
    standard = ((wide - wide.mean(0)) / wide.std(0)).astype(np.float32)
    with threadpool_limits(1):
        theirs = LogisticRegression(C=0.01, max_iter=300, tol=1e-3).fit(standard, labels)
    decision = theirs.decision_function(standard)
    if classes == 2:
        decision = np.stack([np.zeros_like(decision), decision], 1)
    ours = head(features)
    ours, decision = ours - ours.mean(1, keepdims=True), decision - decision.mean(1, keepdims=True)
    assert np.abs(decision).max() > 0.5
    np.testing.assert_allclose(ours, decision, atol=2e-4)
    shares = np.exp(ours) / np.exp(ours).sum(1, keepdims=True)
    np.testing.assert_allclose(shares, theirs.predict_proba(standard), atol=1e-4)


def test_two_classes():
    features, labels = problem(2, spread=1.5)
    head = fit_head(features, labels, 2, 0.1)
    out = head(features)
    np.testing.assert_allclose(out[:, 0], -out[:, 1], atol=1e-4)
    assert (out.argmax(1) == labels).mean() > 0.8
    swapped = fit_head(features, 1 - labels, 2, 0.1)(features)
    np.testing.assert_allclose(swapped[:, 0], out[:, 1], atol=1e-2)


@pytest.mark.parametrize("value", [0.0, 5.3, 123.456, -1e4, 1e-9])
def test_dead_channels(value):
    """A channel that never changes is ignored, however its mean rounds, also when a new image has a trace of it."""
    features, labels = problem(3, n=3001, spread=2.0)
    without = fit_head(features, labels, 3, 0.01)
    head = fit_head(np.column_stack([features, np.full(len(features), value, np.float32)]), labels, 3, 0.01)
    assert np.abs(head.weight[:, -1]).max() < 1e-4
    trace = np.column_stack([features, np.full(len(features), value * (1 + 1e-4) + 1e-4, np.float32)])
    np.testing.assert_allclose(head(trace), without(features), atol=1e-2)


def test_large_offsets():
    """A mean far above the spread (as after a bias) costs no precision in the fit."""
    features, labels = problem(3, n=20_000, spread=1.0)
    standard = (features - features.mean(0, dtype=np.float64)) / features.std(0, dtype=np.float64)
    standard = standard.astype(np.float32)
    near = fit_head(standard, labels, 3, 0.01)(standard)
    far = fit_head(standard + np.float32(300), labels, 3, 0.01)(standard + np.float32(300))
    np.testing.assert_allclose(far - far.mean(1, keepdims=True), near - near.mean(1, keepdims=True), atol=5e-3)


def test_deterministic():
    features, labels = problem(5)
    before = features.copy()
    one, two = fit_head(features, labels, 5, 0.01), fit_head(features, labels, 5, 0.01)
    assert np.array_equal(one.weight, two.weight) and np.array_equal(one.bias, two.bias)
    assert np.array_equal(features, before)


def test_strength_is_the_inverse_of_the_penalty():
    features, labels = problem(3, spread=2.0)
    sizes = [np.abs(fit_head(features, labels, 3, s)(features)).mean() for s in (1e-5, *STRENGTHS)]
    assert sizes == sorted(sizes) and sizes[0] < 0.1 * sizes[-1]


def test_missing_classes():
    features, labels = problem(3)
    assert why_not(labels, 3) == ""
    assert why_not(labels, 5) == "2 of 5 classes have no training image"
    with pytest.raises(DownresError, match="No head can be fitted, 1 of 4 classes have no training image: give images"):
        fit_head(features, labels, 4, 0.01)
    with pytest.raises(DownresError, match="1 of 2 classes"):
        fit_head(features, np.zeros_like(labels), 2, 0.01)


def test_head_is_a_linear_layer():
    head = Head(np.array([[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]], np.float32), np.array([0.5, 0.0, 1.0], np.float32))
    np.testing.assert_array_equal(head(np.array([[1.0, 1.0], [2.0, 0.0]], np.float32)), [[3.5, 7.0, 0.0], [2.5, 6.0, 1.0]])


def test_crop_options():
    for native in (0.875, 0.9, 0.95, 0.965, 1.0, 224 / 256, 0.7):
        options = crop_options(native)
        assert options[0] == native and len(set(options)) == len(options)
        assert all(0 < o <= 1 for o in options) and any(abs(o - 1.0) <= 0.03 or o == 1.0 for o in options)
        assert all(abs(o - native) > 0.02 for o in options[1:])
    assert 1.0 in crop_options(0.875) and 0.875 in crop_options(1.0)


def test_log_loss_is_that_of_scikit_learn():
    from scipy.special import softmax
    from sklearn.metrics import log_loss as reference

    rng = np.random.default_rng(3)
    logits, labels = 5 * rng.standard_normal((50, 4)), rng.integers(0, 4, 50)
    assert log_loss(logits, labels) == pytest.approx(reference(labels, softmax(logits, axis=1), labels=range(4)))
    assert log_loss(logits + 1000, labels) == pytest.approx(log_loss(logits, labels))
