"""Attacks on a trained network, and whether its features betray them (CSG, section 5.2)."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast._terminal import counted
from picnn_fast.data.loading import SeededDataModule, derive_seed
from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.evaluation.observation import Observation
from picnn_fast.metrics import TRAINING_SAMPLES, Detection, DetectionError
from picnn_fast.models.base import InterpretableNetwork

with extra("train"):
    from rich.progress import track
    from torchmetrics import Metric

ATTACKS = ("fgsm", "pgd", "cw")
EPSILON = 8 / 255
STEP = 2 / 255
STEPS = 40
WEIGHT = 1.0  # c of Carlini and Wagner
ITERATIONS = 10  # each with a line search
# How far rounding may take a pixel out of [0, 1].
_ROUNDING = 1e-3
# Of the test split; the attack of Carlini and Wagner takes many times as long as the others.
MOST_ATTACKED = {"fgsm": 4000, "pgd": 4000, "cw": 2000}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Seen(NamedTuple):
    """What a network makes of images and of their attacked copies.

    Attributes:
        normal, adversarial: ``[B, F]`` features of either.
        logits, adversarial_logits: ``[B, K]`` of either.
    """

    normal: Tensor
    adversarial: Tensor
    logits: Tensor
    adversarial_logits: Tensor


class Attack:
    """An attack on a network that knows its weights, each image towards a class drawn at random.

    Pixels are changed within [0, 1]; normalisation belongs to what is attacked. All attacks start
    at the image and aim at a class drawn of those that are not its label, as in the paper, which
    gives no settings: these are "fgsm", a step of ε = 8/255; "pgd", 40 steps of 2/255 within
    8/255; "cw", the L2 attack of Carlini and Wagner at a constant c = 1, without their search for
    c, in ten iterations, whose steps a line search finds, and which leaves an image as it was where
    it does not reach its class. By adversarial-robustness-toolbox.

    The network is copied, and its parameters' gradients are left alone.

    Args:
        network: to attack, by all its filters.
        name: "fgsm", "pgd" or "cw".
        mean, std: that images are normalised by, ``[C, 1, 1]`` on a scale of [0, 1]; None: they are
            not.

    Raises:
        ImportError: adversarial-robustness-toolbox is not installed.
        ValueError: another name; a network of a single class.

    Source:
        Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015;
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018;
        Carlini, Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017.
    """

    def __init__(
        self,
        network: InterpretableNetwork,
        name: str,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        self.name = checks.one_of("attack", name, ATTACKS)
        if network.num_classes < 2:
            raise ValueError("network: got a single class, want another to attack towards")
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        device = next(self.network.parameters()).device
        self.mean = torch.zeros(1, device=device) if mean is None else mean.to(device)
        self.std = torch.ones(1, device=device) if std is None else std.to(device)

    def __call__(self, images: Tensor, labels: Tensor, *, seed: int = 0) -> Tensor:
        """The attacked images.

        Args:
            images: ``[B, C, H, W]`` float32 as the network takes them.
            labels: ``[B]`` integers in [0, K).
            seed: of the classes that are aimed at.

        Returns:
            The same shape, dtype and device as ``images``.

        Raises:
            TypeError, ValueError: images that are no images whose pixels are in [0, 1] before
                normalisation; labels that are no class indices.
        """
        checks.floating("images", images)
        classes = self.network.num_classes
        checks.labels("labels", labels, len(images), classes)
        pixels = images * self.std.to(images) + self.mean.to(images)
        least, most = pixels.aminmax()
        if not (least >= -_ROUNDING and most <= 1 + _ROUNDING):
            raise ValueError(
                f"images: got pixels in [{least.item():.3g}, {most.item():.3g}], want them in"
                " [0, 1] before they were normalised; give the mean and std that they were"
                " normalised by"
            )
        draw = torch.Generator().manual_seed(seed)
        away = torch.randint(1, classes, (len(labels),), generator=draw)
        targets = (labels.cpu() + away) % classes
        with torch.enable_grad():
            victims = pixels.clamp(0, 1).float().cpu().numpy()
            attacked = self._method(pixels).generate(victims, targets.numpy())
        attacked = torch.from_numpy(attacked).to(images)
        return (attacked - self.mean.to(images)) / self.std.to(images)

    def see(self, images: Tensor, labels: Tensor, *, seed: int = 0) -> Seen:
        """Attack images, and run the network on them and on the attacked copies.

        Args:
            images, labels, seed: see ``__call__``.
        """
        normal, logits = convolution_means(self.network, images)
        attacked = self(images, labels, seed=seed)
        adversarial, adversarial_logits = convolution_means(self.network, attacked)
        return Seen(normal, adversarial, logits, adversarial_logits)

    def _method(self, pixels: Tensor) -> Any:
        """The library's attack on images of this size."""
        with extra("attacks"):
            from art.attacks.evasion import (
                CarliniL2Method,
                FastGradientMethod,
                ProjectedGradientDescentPyTorch,
            )
            from art.estimators.classification import PyTorchClassifier
        victim = PyTorchClassifier(
            model=_OnPixels(self.network, self.mean, self.std),
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(pixels.shape[1:]),
            nb_classes=self.network.num_classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if pixels.is_cuda else "cpu",
        )
        shared = {"targeted": True, "batch_size": len(pixels)}
        if self.name == "fgsm":
            return FastGradientMethod(victim, eps=EPSILON, **shared)
        if self.name == "pgd":
            return ProjectedGradientDescentPyTorch(
                victim, eps=EPSILON, eps_step=STEP, max_iter=STEPS, verbose=False, **shared
            )
        return CarliniL2Method(
            victim,
            initial_const=WEIGHT,
            binary_search_steps=1,
            max_iter=ITERATIONS,
            verbose=False,
            **shared,
        )


class _OnPixels(nn.Module):
    """The network with normalisation before it: pixels in [0, 1] to logits ``[B, K]``."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: InterpretableNetwork, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pixels: Tensor) -> Tensor:
        maps, bypass = self.network.encode((pixels - self.mean) / self.std)
        return self.network.head_logits(maps, bypass=bypass)


@torch.no_grad()
def convolution_means(network: InterpretableNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Spatial means of the maps of every convolution, in the order in which they run; and logits.

    Args:
        network: in eval mode.
        images: ``[B, C, H, W]`` as the network takes them.

    Returns:
        ``[B, F]`` float32 or wider, F the filters of all convolutions, before any activation; and
        logits ``[B, K]``.

    Raises:
        ValueError: the network has no convolution.
    """
    means: list[Tensor] = []

    def keep(_: nn.Module, __: object, maps: Tensor) -> None:
        means.append(maps.flatten(2).mean(-1, dtype=torch.promote_types(maps.dtype, torch.float32)))

    layers = [x for x in network.modules() if isinstance(x, _CONVOLUTIONS)]
    hooks = [x.register_forward_hook(keep) for x in layers]
    try:
        maps, bypass = network.encode(images)
        logits = network.head_logits(maps, bypass=bypass)
    finally:
        for hook in hooks:
            hook.remove()
    if not means:
        raise ValueError("network: got no convolution, want one whose maps tell of an attack")
    return torch.cat(means, 1), logits


class AttackDetection(DetectionError):
    """``DetectionError`` of the attacks that it makes itself.

    Args:
        attack: on the network.
        samples, seeds, all_attacked, **kwargs: of ``DetectionError``.
    """

    def __init__(self, attack: Attack, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attack = attack

    def update(  # type: ignore[override]
        self, images: Tensor, labels: Tensor, *, seed: int = 0
    ) -> None:
        """Attack a batch, and add it.

        Args:
            images, labels, seed: see ``Attack``.
        """
        super().update(*self.attack.see(images, labels, seed=seed), labels)


def adversarial_detection(
    network: InterpretableNetwork,
    images: Tensor,
    labels: Tensor,
    *,
    attack: str = "pgd",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    samples: Sequence[int] = (500, 1000, 2000),
    seeds: int = 5,
    all_attacked: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Detection:
    """How well a random forest tells attacked images by a network's features.

    The features are the means of the maps of every convolution (``convolution_means``), the attacks
    those of ``Attack``, the forest that of ``metrics.DetectionError``, which counts images that
    were classified rightly and no longer are.

    Args:
        network: trained; it is copied.
        images: ``[M, C, H, W]`` as the network takes them, on any device: attacked in batches.
        labels: ``[M]`` integers in [0, K).
        attack: "fgsm", "pgd" or "cw".
        mean, std: that images are normalised by, ``[C, 1, 1]``; None: they are in [0, 1].
        samples, seeds, all_attacked: see ``metrics.DetectionError``.
        batch_size: images attacked at a time.
        seed: of the classes that attacks aim at.
        progress: show a progress bar.

    Returns:
        Errors of every number of training samples and seed, accuracy before and after the attack,
        and the attack's success.

    Raises:
        ImportError: adversarial-robustness-toolbox is not installed.
        TypeError, ValueError: an argument of the wrong kind or out of range.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-specific Filters", ECCV 2020, section 5.2, table 3.

    Example:
        >>> import torch
        >>> from picnn_fast import make_interpretable
        >>> from picnn_fast.evaluation import adversarial_detection
        >>> network = make_interpretable("small-cnn", "std", num_classes=3, num_filters=6)
        >>> images, labels = torch.rand(12, 3, 16, 16), torch.arange(12) % 3
        >>> found = adversarial_detection(
        ...     network, images, labels, attack="fgsm", samples=[6], all_attacked=True
        ... )
        >>> found.errors.shape
        torch.Size([1, 5])
    """
    checks.integer("batch_size", batch_size, 1)
    checks.integer("seed", seed, 0)
    metric = AttackDetection(
        Attack(network, attack, mean=mean, std=std), samples, seeds=seeds, all_attacked=all_attacked
    )
    device = next(network.parameters()).device
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    for number, (some, of) in enumerate(
        track(batches, "attacking", transient=True, disable=not progress)
    ):
        metric.update(some.to(device), of.to(device), seed=derive_seed(seed, number))
    found: Detection = metric.compute()
    return found


def _needs_detection(network: InterpretableNetwork, data: SeededDataModule) -> str | None:
    images = len(data.test_set)  # type: ignore[arg-type]
    if network.num_classes < 2:
        return "there is no other class to attack towards"
    if not any(isinstance(x, _CONVOLUTIONS) for x in network.modules()):
        return "there is no convolution"
    if images < TRAINING_SAMPLES[0]:
        return f"the test split has {counted(images, 'image')}, want at least {TRAINING_SAMPLES[0]}"
    return None


def _update_detection(metric: Any, seen: Observation) -> None:
    metric.update(seen.images, seen.labels, seed=seen.seed)


def _detection(name: str, attack: str) -> dict[str, Figure]:
    """Of images attacked in one way: whether they are told, and whether the attack succeeds."""

    def metric(network: InterpretableNetwork, data: SeededDataModule, draws: int) -> Metric:
        return AttackDetection(Attack(network, name, mean=data.mean, std=data.std))

    shared: Any = {
        "metric": metric,
        "update": _update_detection,
        "needs": _needs_detection,
        "when": "asked",
        "images": MOST_ATTACKED[name],
        "better": "lower",
    }
    return {
        f"detection_{name}": Figure(
            heading=f"detection {name}",
            meaning=f"error of a forest that tells images attacked by {attack}, where it succeeded",
            reading=(
                "Lower is better: chance is 0.5, and a plain network's is the mark to beat; of the"
                " most training samples, 2000 at most, that the images give."
            ),
            part="error",
            **shared,
        ),
        f"attack_{name}": Figure(
            heading="… succeeds",
            meaning="share of images classified rightly that no longer are once attacked",
            reading=(
                "Lower is better: 0 where no attack succeeds, of a plain network it is often near"
                " 1, and there is no chance in it."
            ),
            part="success",
            **shared,
        ),
    }


FIGURES: dict[str, Figure] = {
    **_detection("fgsm", "FGSM"),
    **_detection("pgd", "PGD"),
    **_detection("cw", "Carlini and Wagner"),
}
