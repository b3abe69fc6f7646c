"""Metrics of interpretability, as torchmetrics metrics to drop into any loop."""

from picnn_fast._extras import extra

with extra("train"):
    from picnn_fast.metrics.bootstrap import MeanOverImages, PerImageMetric, resampled_means
    from picnn_fast.metrics.calibration import CalibrationError
    from picnn_fast.metrics.leakage import MaskLeakage
    from picnn_fast.metrics.localisation import (
        ActivMapLocalisation,
        CAMLocalisation,
        GradMapLocalisation,
        Localisation,
        SaliencyLocalisation,
    )
    from picnn_fast.metrics.mutual_information import MutualInformationScore
    from picnn_fast.metrics.parts import LocationInstability, PartInterpretability
    from picnn_fast.metrics.pathway import MeanOverDraws, PathwayAccuracy
    from picnn_fast.metrics.pointing_game import PointingGame
    from picnn_fast.metrics.throughput import Speed, Throughput

__all__ = [
    "ActivMapLocalisation",
    "CAMLocalisation",
    "CalibrationError",
    "GradMapLocalisation",
    "Localisation",
    "LocationInstability",
    "MaskLeakage",
    "MeanOverDraws",
    "MeanOverImages",
    "MutualInformationScore",
    "PartInterpretability",
    "PathwayAccuracy",
    "PerImageMetric",
    "PointingGame",
    "SaliencyLocalisation",
    "Speed",
    "Throughput",
    "resampled_means",
]
