"""8 bits by NNCF, of OpenVINO's models and of ONNX graphs."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from ..errors import first_line
from .engine import Batches, QuantizationFailed


def quantized(
    model: Any,
    images: Batches,
    kept: Collection[str],
    transformer: bool,
    ranges: str,
    *,
    input_name: str = "",
    half: bool = False,
) -> Any:
    """The model in 8 bits, one scale for each activation. kept: operators that stay in float. input_name: of an ONNX graph,
    which takes its input by name. half: weights of 7 bits. Raises QuantizationFailed.
    """
    import nncf
    from nncf.quantization.advanced_parameters import OverflowFix, QuantizationParameters

    advanced: dict[str, Any] = {"activations_range_estimator_params": _estimator(ranges)}
    if input_name:
        advanced["overflow_fix"] = OverflowFix.ENABLE if half else OverflowFix.DISABLE
        # ONNX Runtime takes one zero point an activation; NNCF gives the depthwise convolutions of ONNX one a channel.
        advanced["activations_quantization_params"] = QuantizationParameters(per_channel=False)
    try:
        return nncf.quantize(
            model,
            nncf.Dataset(_single(images), (lambda image: {input_name: image}) if input_name else None),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            subset_size=images.images,
            ignored_scope=nncf.IgnoredScope(names=sorted(kept), validate=False) if kept else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(**advanced),
        )
    except Exception as error:
        raise QuantizationFailed(f"NNCF cannot quantize it ({first_line(error)[:200]})") from error


def _single(images: Batches) -> Any:
    """The images of the batches, one at a time; NNCF goes through them several times."""

    class Images:
        def __iter__(self) -> Iterator[np.ndarray]:
            return (image[None] for batch in images.make() for image in batch)

    return Images()


def _estimator(ranges: str) -> Any:
    """How NNCF takes the ranges of activations. Its own choice, the mean of each image's extremes, cuts off what few images
    have: on photographs of solar cells the answers of a small network were 0.59 of their spread off with it, 0.025 with all
    that is seen.
    """
    from nncf.quantization.range_estimator import (
        AggregatorType,
        RangeEstimatorParameters,
        RangeEstimatorParametersSet,
        StatisticsCollectorParameters,
        StatisticsType,
    )

    if ranges == "entropy":
        return RangeEstimatorParametersSet.HISTOGRAM
    if ranges == "percentile":
        one = StatisticsCollectorParameters(StatisticsType.QUANTILE, AggregatorType.MEAN, quantile_outlier_prob=1e-4)
        return RangeEstimatorParameters(one, one)
    return RangeEstimatorParametersSet.MINMAX
