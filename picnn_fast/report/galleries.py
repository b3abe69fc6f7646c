"""Pictures for the HTML report, in rows: arrays with what they show in words."""

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast._terminal import counted
from picnn_fast.explain import FilterIndex, LocalisationExamples, PathwayGradCam
from picnn_fast.report.parts import peak_density
from picnn_fast.report.style import HEAT_COLOURS, displayed, overlaid

with extra("report"):
    from matplotlib import colormaps
    from PIL import Image

_TILE = 160  # pixels of a picture's longer side, at most
_IMAGES_OF_A_FILTER = 6
_Pixels = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of a gallery.

    Attributes:
        pixels: ``[H, W]`` grey or ``[H, W, 3]``, in [0, 1].
        alt: what it shows, in words.
        caption: below it.
        box: left, top, right, bottom of a field to draw, as shares of the image's sides.
    """

    pixels: _Pixels
    alt: str
    caption: str = ""
    box: tuple[float, float, float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GalleryRow:
    """Pictures that belong together.

    Attributes:
        heading: beside them.
        pictures: from left to right.
        said: below the heading, a few words.
        above: a sentence over the row, and over those below it.
    """

    heading: str
    pictures: Sequence[Picture]
    said: str = ""
    above: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gallery:
    """Rows of pictures.

    Attributes:
        rows: each with as many pictures as there are columns, where these have headings.
        columns: a heading each; none where pictures have captions.
        scale: what the colours of heat mean; empty where there is none.
    """

    rows: Sequence[GalleryRow]
    columns: Sequence[str] = ()
    scale: str = ""


def grad_cam_gallery(
    images: Tensor, cam: PathwayGradCam, labels: Sequence[str], predicted: Sequence[str]
) -> Gallery:
    """Image, all filters, class filters, the others and the control, a row each image.

    The colours of one image share one scale, from 0 to the highest value of its four maps.

    Args:
        images: ``[B, C, H, W]`` in [0, 1], grey or RGB.
        cam: of these images.
        labels, predicted: B names of classes.

    Raises:
        TypeError, ValueError: see ``displayed``.
    """
    rows = []
    names = ("all filters", "the class's filters", "all the others", "as many at random")
    for i, image in enumerate(displayed(images)):
        heats = [maps[i].detach().cpu().float() for maps in cam]
        peak = max(float(heat.max()) for heat in heats)
        pictures = [Picture(pixels=_enlarged(image), alt=f"Test image of class {labels[i]}")]
        for name, heat in zip(names, heats, strict=True):
            share = float(heat.max()) / peak if peak > 0 else 0.0
            pictures.append(
                Picture(
                    pixels=_on_image(image, heat / (peak or 1.0)),
                    alt=f"Grad-CAM of class {labels[i]} through {name}: at most {share:.0%} of the"
                    " row's highest value",
                )
            )
        right = predicted[i] == labels[i]
        said = "" if right else f"taken for {predicted[i]}"
        rows.append(GalleryRow(heading=labels[i], pictures=pictures, said=said))
    return Gallery(
        rows=rows,
        columns=("image", *names),
        scale="Grad-CAM, share of the row's highest value",
    )


def _enlarged(image: _Pixels) -> _Pixels:
    """Small images are shown with the pixels they have, larger."""
    times = max(1, _TILE // max(image.shape[:2]))
    return image.repeat(times, 0).repeat(times, 1)


def _on_image(image: _Pixels, heat: Tensor) -> _Pixels:
    large = _enlarged(image)
    smooth = F.interpolate(
        heat[None, None], size=large.shape[:2], mode="bilinear", align_corners=False
    )
    return overlaid(large, smooth[0, 0].numpy())


def data_uri(picture: Picture, side: int = _TILE) -> str:
    """A picture as the source of an ``<img>``: a JPEG in text, so many pixels long at most."""
    values = np.rint(255 * np.clip(picture.pixels, 0, 1)).astype(np.uint8)
    image = Image.fromarray(values)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _jpeg(image)


def _jpeg(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def heat_scale() -> str:
    """The colours of heat from 0 to 1, as a picture."""
    colours = colormaps[HEAT_COLOURS](np.linspace(0, 1, 256))[None, :, :3].repeat(12, 0)
    return _jpeg(Image.fromarray(np.rint(255 * colours).astype(np.uint8)))


def filter_gallery(
    index: FilterIndex,
    filters: Sequence[int],
    images: Mapping[int, Tensor],
    class_names: Sequence[str],
    part_names: Sequence[str] = (),
) -> Gallery:
    """Two rows a filter: the images that it fires on most, and those it adds most to.

    Images keep their colours; a box is where the receptive field of the peak ends within the image.

    Args:
        index: of ``filter_index``.
        filters: indices in [0, N).
        images: those of ``index.images_of(filters)`` by their index, ``[C, H, W]`` in [0, 1], grey
            or RGB, before they are normalised.
        class_names: K names.
        part_names: P names, where the index was made with part masks.

    Raises:
        TypeError: images that are no floating tensors.
        ValueError: no filter, one out of range, or an image that is missing.
    """
    if not filters:
        raise ValueError("filters: got none, want at least 1")
    for number in filters:
        checks.integer("filters", number, 0, index.num_filters)
    wanted = index.images_of(filters)
    missing = [i for i in wanted if i not in images]
    if missing:
        raise ValueError(f"images: got no image {missing[0]}, want all of index.images_of(filters)")
    pixels = dict(zip(wanted, displayed(torch.stack([images[i] for i in wanted])), strict=True))
    rows = []
    for number in filters:
        for heading, what, above in (
            ("fires most on", "by_activation", _told(index, number, class_names, part_names)),
            ("adds most to", "by_contribution", ""),
        ):
            pictures = [
                _of_filter(index, what, number, place, pixels, class_names)
                for place in range(min(_IMAGES_OF_A_FILTER, index.by_activation.images.shape[1]))
            ]
            rows.append(GalleryRow(heading=heading, pictures=pictures, above=above))
    return Gallery(rows=rows)


def _told(
    index: FilterIndex, number: int, class_names: Sequence[str], part_names: Sequence[str]
) -> str:
    """What an index says of a filter, in a sentence."""
    owner = int(index.owner[number])
    stands = "no class"
    if owner >= 0:
        stands = f"{class_names[owner]} ({float(index.owned[number]):.2f})"
    said = [f"Filter {number} stands for {stands}"]
    if index.constant[number]:
        return f"{said[0]}; its mean is the same in all images."
    nats, most = index.mutual_information[:, number].max(0)
    said.append(f"tells most about {class_names[int(most)]}, {float(nats):.2f} nats")
    if part_names:
        share, part = index.by_activation.parts[number].float().mean(0).max(0)
        said.append(f"peaks on {part_names[int(part)]} in {float(share):.0%} of its top images")
    near = [
        f"{i} ({value:.2f})"
        for i, value in zip(
            index.neighbours[number, :2].tolist(),
            index.correlations[number, :2].tolist(),
            strict=True,
        )
    ]
    if near:
        said.append(f"goes along with filter {' and '.join(near)}")
    return f"{'; '.join(said)}."


def _of_filter(
    index: FilterIndex,
    what: str,
    number: int,
    place: int,
    pixels: Mapping[int, _Pixels],
    class_names: Sequence[str],
) -> Picture:
    ranking = getattr(index, what)
    image = int(ranking.images[number, place])
    label, predicted = (int(x[number, place]) for x in (ranking.labels, ranking.predicted))
    value = float(ranking.values[number, place])
    name = class_names[label]
    if predicted != label:
        name += f", taken for {class_names[predicted]}"
    amount = f"{value:.3g}" if what == "by_activation" else f"{value:+.3g}"
    doing = "fires at most" if what == "by_activation" else "adds"
    box = None
    if index.field is not None:
        height, width = index.image_size
        left, top, right, bottom = ranking.boxes[number, place].tolist()
        box = (left / width, top / height, right / width, bottom / height)
        if box == (0, 0, 1, 1):
            box = None
    return Picture(
        pixels=_enlarged(pixels[image]),
        alt=f"Test image {image} of class {name}; filter {number} {doing} {amount}",
        caption=f"{name}: {amount}",
        box=box,
    )


def peak_gallery(images: Tensor, peaks: Tensor, labels: Sequence[str]) -> Gallery:
    """Each image beside where the peaks of all filters fall on it (ICNN, figure 6).

    Args:
        images: ``[B, C, H, W]`` in [0, 1], grey or RGB.
        peaks: ``[B, N, 2]`` (x, y) in pixels, as ``ReceptiveField.peaks`` gives; NaN for a filter
            that does not fire.
        labels: B names of classes.

    Raises:
        TypeError, ValueError: see ``displayed``.
    """
    height, width = images.shape[2:]
    sigma = math.hypot(height, width) / 24
    pictures = []
    for image, places, label in zip(
        displayed(images), peaks.detach().cpu().float(), labels, strict=True
    ):
        heat = peak_density(places, height, width, sigma)
        count = int((~places.isnan().any(-1)).sum())
        firing = counted(count, "filter")
        shown = _on_image(image, heat / (float(heat.max()) or 1.0))
        pictures += [
            Picture(pixels=_enlarged(image), alt=f"Test image of class {label}", caption=label),
            Picture(
                pixels=shown,
                alt=f"Density of the peaks of {firing} on the image of class {label}",
                caption=f"{firing} fire{'s' * (count == 1)}",
            ),
        ]
    rows = [
        GalleryRow(heading="", pictures=pictures[start : start + 6])
        for start in range(0, len(pictures), 6)
    ]
    return Gallery(rows=rows, scale="density of peaks, share of the image's highest value")


def localisation_gallery(
    images: Tensor, examples: LocalisationExamples, object_masks: Tensor, labels: Sequence[str]
) -> Gallery:
    """Image, class activation map and GradMap, each with the outline of the object.

    Args:
        images: ``[B, C, H, W]`` in [0, 1], grey or RGB.
        examples: of these images.
        object_masks: ``[B, H, W]`` bool.
        labels: B names of classes.

    Raises:
        TypeError, ValueError: see ``displayed``.
    """
    rows = []
    for i, image in enumerate(displayed(images)):
        outline = _outline(object_masks[i].cpu())
        pictures = [
            Picture(
                pixels=_outlined(_enlarged(image), outline),
                alt=f"Test image of class {labels[i]} with the outline of the object",
            )
        ]
        for name, heat, iou in (
            ("CAM", examples.cam[i], float(examples.cam_ious[i])),
            ("GradMap", examples.gradmap[i], float(examples.gradmap_ious[i])),
        ):
            heat = heat.detach().cpu().float().clamp_min(0)
            told = "no object" if math.isnan(iou) else f"IoU {iou:.2f}"
            shown = _on_image(image, heat / (float(heat.max()) or 1.0))
            pictures.append(
                Picture(
                    pixels=_outlined(shown, outline),
                    alt=f"{name} of class {labels[i]} with the outline of the object: {told}",
                    caption=told,
                )
            )
        rows.append(GalleryRow(heading=labels[i], pictures=pictures))
    return Gallery(
        rows=rows,
        columns=("image", "CAM", "GradMap"),
        scale="share of the picture's highest value",
    )


def _outline(mask: Tensor) -> Tensor:
    """The edge of a mask ``[H, W]``: 1 just outside it, -1 just inside, 0 elsewhere."""
    inside = mask.float()[None, None]
    wide = F.max_pool2d(inside, 3, 1, 1)
    narrow = -F.max_pool2d(-inside, 3, 1, 1)
    return (wide - inside - (inside - narrow))[0, 0]


def _outlined(image: _Pixels, outline: Tensor) -> _Pixels:
    """A picture with a line, white without and black within, that is seen on any colour."""
    times = image.shape[0] // outline.shape[0]
    line = outline.numpy().repeat(times, 0).repeat(times, 1)[..., None]
    colours = image if image.ndim == 3 else image[..., None].repeat(3, -1)
    return np.where(line > 0, 1, np.where(line < 0, 0, colours)).astype(np.float32)
