"""Explanations of single images: Grad-CAM, on captum, and what each filter adds to a logit."""

from picnn_fast.explain.contributions import FilterGroup, ImageExplanation, explain_image
from picnn_fast.explain.grad_cam import PathwayGradCam, grad_cam, pathway_grad_cam

__all__ = [
    "FilterGroup",
    "ImageExplanation",
    "PathwayGradCam",
    "explain_image",
    "grad_cam",
    "pathway_grad_cam",
]
