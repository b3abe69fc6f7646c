"""Explanations of single images, on captum."""

from picnn_fast.explain.grad_cam import PathwayGradCam, grad_cam, pathway_grad_cam

__all__ = ["PathwayGradCam", "grad_cam", "pathway_grad_cam"]
