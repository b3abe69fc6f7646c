"""Whether what a network computes of an image betrays that the image was attacked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.metrics.pathway import MeanOverDraws
from picnn_fast.metrics.ranks import JoinedMetric, gather_rows

TRAINING_SAMPLES = (500, 1000, 2000)  # table 3 of the paper
TREES = 100
_STATES = ("normal", "adversarial", "right")


class Detection(NamedTuple):
    """Errors of a detector of attacked images, and what came of the attack.

    Attributes:
        error: of the detector at the most training samples for which the images suffice: its mean
            over the seeds, and the standard error of that; NaN where they suffice for none.
        success: of the attack: the share of images classified rightly that no longer are.
        accuracy: of the network, on the images as they are.
        attacked_accuracy: on the attacked ones.
        attacked: images that were attacked.
        used: images of these that the detector was trained or tested on, each with its attacked
            copy.
        samples: ``[L]`` int64, numbers of training samples.
        errors: ``[L, seeds]`` shares of wrongly told samples, a row a number of training samples;
            NaN where the images do not suffice.
    """

    error: MeanOverDraws
    success: Tensor
    accuracy: Tensor
    attacked_accuracy: Tensor
    attacked: Tensor
    used: Tensor
    samples: Tensor
    errors: Tensor


class DetectionError(JoinedMetric):
    """Error rate of a random forest that tells attacked images from those that are as they were.

    The forest is given features of an image, here the means of the maps of every convolution. It is
    trained on as many images as attacked copies of the same ones, and tested on images that it saw
    in neither form: half of the images are set aside for testing, drawn anew for every seed, and
    the training samples are drawn from the rest. The forest's own settings are scikit-learn's, with
    100 trees and ``random_state`` 0: the paper gives none.

    By default an attack counts where it succeeded: the image was classified rightly, and is no
    longer once attacked. Images otherwise are left out, in both forms.

    All features are kept in single precision, 8 · F bytes an image.

    Args:
        samples: numbers of training samples, even, half of them attacked; an error is computed of
            each for which the images suffice.
        seeds: how often images are drawn to be tested or trained on.
        all_attacked: count images whatever came of the attack.
        **kwargs: of ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-specific Filters", ECCV 2020, section 5.2, table 3.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import DetectionError
        >>> metric = DetectionError(samples=[8], seeds=2)
        >>> logits, labels = torch.eye(2)[torch.arange(10) % 2], torch.arange(10) % 2
        >>> metric.update(torch.zeros(10, 3), torch.ones(10, 3), logits, 1 - logits, labels)
        >>> found = metric.compute()
        >>> found.error.mean.item(), found.success.item()
        (0.0, 1.0)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    normal: list[Tensor]
    adversarial: list[Tensor]
    right: list[Tensor]

    def __init__(
        self,
        samples: Sequence[int] = TRAINING_SAMPLES,
        *,
        seeds: int = 5,
        all_attacked: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(samples, str) or not isinstance(samples, Sequence):
            raise TypeError(f"samples: got {type(samples).__name__}, want a list of numbers")
        self.samples = sorted(checks.integer("samples", count, 2) for count in samples)
        if not self.samples or any(count % 2 for count in self.samples):
            raise ValueError(f"samples: got {list(samples)}, want even numbers, half of each class")
        self.seeds = checks.integer("seeds", seeds, 1)
        self.all_attacked = checks.boolean("all_attacked", all_attacked)
        for name in _STATES:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        normal: Tensor,
        adversarial: Tensor,
        logits: Tensor,
        adversarial_logits: Tensor,
        labels: Tensor,
    ) -> None:
        """Add a batch of images and their attacked copies.

        Args:
            normal, adversarial: ``[B, F]`` features of either, any floating dtype.
            logits, adversarial_logits: ``[B, K]`` by which either is classified.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.pooled("normal", normal)
        checks.pooled("adversarial", adversarial)
        if adversarial.shape != normal.shape:
            raise ValueError(
                f"adversarial: got shape {tuple(adversarial.shape)}, want {tuple(normal.shape)}"
                " like normal"
            )
        for name, value in (("logits", logits), ("adversarial_logits", adversarial_logits)):
            checks.floating(name, value)
            if value.ndim != 2 or len(value) != len(normal) or value.shape != logits.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(value.shape)}, want [{len(normal)}, classes]"
                )
        checks.labels("labels", labels, len(normal), logits.shape[1])
        for state, features in ((self.normal, normal), (self.adversarial, adversarial)):
            state.append(features.detach().to(self.device, torch.float32, copy=True))
        right = [(value.argmax(1) == labels) for value in (logits, adversarial_logits)]
        self.right.append(torch.stack(right, 1).to(self.device, torch.uint8))

    def join(self, to: int | None = None, group: Any = None) -> None:
        for name in _STATES:
            state = getattr(self, name)
            joined = gather_rows(torch.cat(state) if state else None, to, group)
            if joined is not None:
                setattr(self, name, [joined.to(self.device)])

    def compute(self) -> Detection:
        """Of all images; shares in [0, 1], float64 on the CPU."""
        right = torch.cat(self.right).cpu().bool()
        fooled = right[:, 0] & ~right[:, 1]
        used = torch.ones_like(fooled) if self.all_attacked else fooled
        # Of each image used both forms, [U, 2, F].
        states = (self.normal, self.adversarial)
        features = torch.stack([torch.cat(state).cpu()[used] for state in states], 1).numpy()
        seeds = range(self.seeds)
        rows = [[_error(features, count, seed) for seed in seeds] for count in self.samples]
        errors = torch.tensor(rows, dtype=torch.float64)
        enough = ~errors.isnan().any(1)
        accuracy, attacked_accuracy = right.double().mean(0)
        return Detection(
            error=MeanOverDraws.of(errors[enough][-1] if enough.any() else errors[0]),
            success=fooled.sum().double() / right[:, 0].sum(),
            accuracy=accuracy,
            attacked_accuracy=attacked_accuracy,
            attacked=torch.tensor(len(right)),
            used=used.sum(),
            samples=torch.tensor(self.samples),
            errors=errors,
        )


def _error(features: np.ndarray, count: int, seed: int) -> float:
    """Share of wrongly told images of the half that is tested on, or NaN.

    Args:
        features: ``[U, 2, F]`` of each image as it was, and attacked.
        count: of training samples.
        seed: of the images to test on, and of those of the rest to train on.
    """
    from sklearn.ensemble import RandomForestClassifier

    order = np.random.default_rng(seed).permutation(len(features))
    tested = len(features) // 2
    if count // 2 > tested:
        return float("nan")
    test, train = order[:tested], order[tested : tested + count // 2]
    forest = RandomForestClassifier(TREES, random_state=0)
    forest.fit(features[train].reshape(count, -1), np.tile([0, 1], len(train)))
    told = forest.predict(features[test].reshape(2 * tested, -1))
    return float((told != np.tile([0, 1], tested)).mean())
