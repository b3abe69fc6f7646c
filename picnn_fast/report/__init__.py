"""Pictures of a run, as PNG files."""

from picnn_fast.report.figures import plot_correspondence, plot_curves, plot_grad_cam

__all__ = ["plot_correspondence", "plot_curves", "plot_grad_cam"]
