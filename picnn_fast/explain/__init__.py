"""What filters see and carry: Grad-CAM, on captum, shares of a logit, an index of all filters."""

from picnn_fast.explain.contributions import (
    ContributionMaps,
    FilterGroup,
    ImageExplanation,
    contribution_maps,
    explain_image,
)
from picnn_fast.explain.filter_index import FilterIndex, TopImages, filter_index
from picnn_fast.explain.grad_cam import PathwayGradCam, grad_cam, pathway_grad_cam
from picnn_fast.explain.localisation import LocalisationExamples, localisation_examples
from picnn_fast.models.gradients import class_activation, class_saliency, filter_saliency

__all__ = [
    "ContributionMaps",
    "FilterGroup",
    "FilterIndex",
    "ImageExplanation",
    "LocalisationExamples",
    "PathwayGradCam",
    "TopImages",
    "class_activation",
    "class_saliency",
    "contribution_maps",
    "explain_image",
    "filter_index",
    "filter_saliency",
    "grad_cam",
    "localisation_examples",
    "pathway_grad_cam",
]
