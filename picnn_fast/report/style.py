"""What the pictures have in common: resolution, colours, and how images are shown."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast._files import replacing

with extra("report"):
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

DPI = 150
HEAT_COLOURS = "inferno"
# Of a text that holds a name: a "$" in it is no mathematics.
AS_IT_IS: dict[str, Any] = {"parse_math": False}
_OVERSHOOT = 0.05
# The image on the heat as a faint light, so that strokes stay visible where the heat is dark.
_IMAGE_SHARE = 0.25
_Image = npt.NDArray[np.float32]


def displayed(images: Tensor) -> list[_Image]:
    """Images as matplotlib takes them, ``[H, W]`` or ``[H, W, 3]`` in [0, 1].

    Where some are out of that range, as after normalisation, a warning says so, and each is shown
    from its lowest value to its highest.

    Args:
        images: ``[B, C, H, W]``, grey or RGB.

    Raises:
        TypeError: no floating tensor.
        ValueError: another shape, or no images.
    """
    checks.floating("images", images)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0:
        raise ValueError(
            f"images: got shape {tuple(images.shape)}, want [B, C, H, W] with 1 or 3 channels, at"
            " least one image"
        )
    pixels = images.detach().cpu().float()
    lowest, highest = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    least, most = lowest.min().item(), highest.max().item()
    # Resizing may overshoot a little.
    if least < -_OVERSHOOT or most > 1 + _OVERSHOOT:
        warnings.warn(
            f"images: got values from {least:.3g} to {most:.3g}, want [0, 1]; each is shown from"
            " its lowest to its highest value, in other colours than its own (normalised images"
            " want their mean and standard deviation back)",
            stacklevel=3,
        )
        pixels = (pixels - lowest) / (highest - lowest).clamp_min(1e-6)
    return list(pixels.clamp(0, 1).movedim(1, -1).squeeze(-1).numpy())


def canvas(
    ax: Axes | None, path: str | Path | None, size: tuple[float, float]
) -> Figure | SubFigure:
    """What to draw on: a new figure of so many inches, or the place of ``ax`` in its own.

    Raises:
        ValueError: axes that are no cell of a grid, or a file to write beside them.
    """
    if ax is None:
        return Figure(figsize=size, layout="constrained", dpi=DPI)
    if path is not None:
        raise ValueError(f"path: got {str(path)!r} beside ax, want one of the two")
    figure, cell = ax.get_figure(), ax.get_subplotspec()
    if figure is None or cell is None:
        raise ValueError("ax: got axes that are no cell of a grid, want one of plt.subplots()")
    ax.remove()
    return figure.add_subfigure(cell)


def saved(figure: Figure | SubFigure, path: str | Path | None) -> Figure | SubFigure:
    """The figure, written to ``path`` where there is one, as that file's name ends, or as PNG."""
    if path is not None and isinstance(figure, Figure):
        path = Path(path)
        if not path.suffix:
            path = path.with_name(f"{path.name}.png")
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:])
    return figure


def overlay(axis: Axes, pixels: _Image, heat: _Image) -> None:
    """Heat in [0, 1] in colours, with the image on it."""
    axis.imshow(heat, cmap=HEAT_COLOURS, vmin=0, vmax=1, interpolation="bilinear")
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest", alpha=_IMAGE_SHARE)


def overlaid(pixels: _Image, heat: _Image) -> _Image:
    """The same as a picture ``[H, W, 3]`` in [0, 1], heat and image being of one size."""
    colours = colormaps[HEAT_COLOURS](heat)[..., :3].astype(np.float32)
    image = pixels if pixels.ndim == 3 else pixels[..., None]
    return (1 - _IMAGE_SHARE) * colours + _IMAGE_SHARE * image


def without_frame(axis: Axes) -> None:
    """Axes without the lines around them."""
    for spine in axis.spines.values():
        spine.set_visible(False)
