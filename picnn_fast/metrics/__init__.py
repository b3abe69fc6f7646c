"""Metrics of interpretability, as torchmetrics metrics to drop into any loop."""

from picnn_fast._extras import extra

with extra("train"):
    from picnn_fast.metrics.bootstrap import (
        MeanOverImages,
        PerImageMetric,
        check_counts,
        draw_counts,
        percentile_interval,
        resampled_means,
    )
    from picnn_fast.metrics.calibration import CalibrationError
    from picnn_fast.metrics.leakage import MaskLeakage
    from picnn_fast.metrics.mutual_information import MutualInformationScore
    from picnn_fast.metrics.mutual_information_estimates import (
        MutualInformationEstimates,
        ScoreEstimates,
    )
    from picnn_fast.metrics.parts import LocationInstability, PartInterpretability
    from picnn_fast.metrics.pathway import MeanOverDraws, PathwayAccuracy
    from picnn_fast.metrics.throughput import Speed, Throughput

__all__ = [
    "CalibrationError",
    "LocationInstability",
    "MaskLeakage",
    "MeanOverDraws",
    "MeanOverImages",
    "MutualInformationEstimates",
    "MutualInformationScore",
    "PartInterpretability",
    "PathwayAccuracy",
    "PerImageMetric",
    "ScoreEstimates",
    "Speed",
    "Throughput",
    "check_counts",
    "draw_counts",
    "percentile_interval",
    "resampled_means",
]
