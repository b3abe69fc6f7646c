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
    from picnn_fast.metrics.class_means import ClassMeans
    from picnn_fast.metrics.detection import TRAINING_SAMPLES, Detection, DetectionError
    from picnn_fast.metrics.filter_cosine import (
        InterClassCorrelation,
        filter_cosines,
        filter_redundancy,
    )
    from picnn_fast.metrics.gate_similarity import GateSimilarities, GateSimilarity
    from picnn_fast.metrics.leakage import MaskLeakage
    from picnn_fast.metrics.localisation import (
        ActivMapLocalisation,
        CAMLocalisation,
        GradMapLocalisation,
        Localisation,
        SaliencyLocalisation,
    )
    from picnn_fast.metrics.mutual_information import MutualInformationScore
    from picnn_fast.metrics.mutual_information_estimates import (
        MutualInformationEstimates,
        ScoreEstimates,
    )
    from picnn_fast.metrics.parts import LocationInstability, PartInterpretability
    from picnn_fast.metrics.pathway import MeanOverDraws, PathwayAccuracy
    from picnn_fast.metrics.pointing_game import PointingGame
    from picnn_fast.metrics.removal import (
        FilterRemoval,
        RemovalAccuracies,
        most_active_filters,
        owned_filters,
    )
    from picnn_fast.metrics.throughput import Speed, Throughput

__all__ = [
    "TRAINING_SAMPLES",
    "ActivMapLocalisation",
    "CAMLocalisation",
    "CalibrationError",
    "ClassMeans",
    "Detection",
    "DetectionError",
    "FilterRemoval",
    "GateSimilarities",
    "GateSimilarity",
    "GradMapLocalisation",
    "InterClassCorrelation",
    "Localisation",
    "LocationInstability",
    "MaskLeakage",
    "MeanOverDraws",
    "MeanOverImages",
    "MutualInformationEstimates",
    "MutualInformationScore",
    "PartInterpretability",
    "PathwayAccuracy",
    "PerImageMetric",
    "PointingGame",
    "RemovalAccuracies",
    "SaliencyLocalisation",
    "ScoreEstimates",
    "Speed",
    "Throughput",
    "check_counts",
    "draw_counts",
    "filter_cosines",
    "filter_redundancy",
    "most_active_filters",
    "owned_filters",
    "percentile_interval",
    "resampled_means",
]
