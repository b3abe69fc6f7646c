"""Pictures of a run: each function returns matplotlib's figure, and writes a file where told.

Or draws into the place of axes of your own, ``ax=``. ``picnn_fast.report.html`` is the page of
``picnn-fast report``.
"""

from picnn_fast.report.explanation import plot_explanation
from picnn_fast.report.figures import plot_correspondence, plot_curves, plot_grad_cam
from picnn_fast.report.filters import plot_filter_page
from picnn_fast.report.parts import plot_filter_images, plot_peak_heat_map, plot_template_gallery

__all__ = [
    "plot_correspondence",
    "plot_curves",
    "plot_explanation",
    "plot_filter_images",
    "plot_filter_page",
    "plot_grad_cam",
    "plot_peak_heat_map",
    "plot_template_gallery",
]
