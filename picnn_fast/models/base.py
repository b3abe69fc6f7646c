"""What every method offers to the training loop, the metrics and the pictures: one protocol."""

import abc
import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast.functional import draw_mask
from picnn_fast.models.masked_head import MaskedHead
from picnn_fast.models.on_backbone import parts_on_backbone


class Performer(NamedTuple):
    """A trained network that another explains, in three parts that run one after the other.

    Attributes:
        target: images to the maps that are explained.
        top: those to the maps of the convolution above them, the last one, after its activation;
            None where there is none.
        rest: on to logits ``[B, K]``.
        target_channels, top_channels: of the maps of both.
    """

    target: nn.Module
    top: nn.Module | None
    rest: nn.Module
    target_channels: int
    top_channels: int


def check_task(task: str, tasks: tuple[str, ...], num_classes: int) -> str:
    """The task of a method that can tell one category, "single", from the rest.

    Raises:
        ValueError: another task, or "single" with other than two classes.
    """
    checks.one_of("task", task, tasks)
    if task == "single" and num_classes != 2:
        raise ValueError(
            f"num_classes: got {num_classes} with task='single', want 2: the rest and the category"
        )
    return task


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each part is in its own mode again."""
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


class InterpretableNetwork(nn.Module, abc.ABC):
    """A classifier cut in two at its target layer, whose filters are to mean something.

    A method implements ``forward`` and ``loss_terms``, and of the rest what it needs: schedules in
    ``begin_epoch``, projections in ``after_step``, ``ownership`` where filters belong to classes.
    Everything a schedule depends on is in the state dict.

    Shapes: B batch, K classes, N filters (channels of the target layer).

    Args:
        features: images to the maps of the target layer, ``[B, N, h, w]``.
        head: the maps to logits ``[B, K]``.
        num_classes: K.
        num_filters: N; what ``features`` yield.
        mask_at: where ``head_logits`` masks filters, see ``MaskedHead``.
        channel_dim: the filter axis of the maps, e.g. -1 for the tokens ``[B, T, N]`` of a ViT.

    Attributes:
        features, head, num_classes, num_filters, channel_dim: as given.
        filters_per_class: filters that ``make_interpretable`` takes for each class where it inserts
            the target layer; None takes as many as the backbone yields.
        draws_masks: whether a class's filters are told by masks drawn of ``ownership``, so that
            figures by such masks, ACC2 and ACC3, apply.
        ownership_meaning: what the matrix of ``ownership`` is, for the reader of a report.
        network_from: the option that names a run, whose trained network the method is put on in
            place of a backbone; None for methods that are put on a backbone.
        compiles_alone: whether ``forward`` may be compiled without the loss; not where the loss
            takes gradients within it.
        recipe: what ``make_interpretable`` made it of; None where it was put together by hand.
        card: of ``from_pretrained``; None for a network that was not loaded so.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range; at the first forward, maps or logits whose sizes
            disagree with ``num_filters`` or ``num_classes``.

    Warns:
        UserWarning: a single class; at the first forward, maps of a single position.
    """

    filters_per_class: ClassVar[float | None] = 12.8  # PICNN, figure 5
    draws_masks: ClassVar[bool] = True
    ownership_meaning: ClassVar[str] = "how much of each filter belongs to each class"
    network_from: ClassVar[str | None] = None
    compiles_alone: ClassVar[bool] = True
    recipe: Mapping[str, Any] | None = None
    card: Mapping[str, Any] | None = None

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        num_classes: int,
        num_filters: int,
        *,
        mask_at: str = "auto",
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        checks.module("features", features)
        checks.module("head", head)
        self.masked_head = MaskedHead(
            head, num_classes, num_filters, mask_at=mask_at, channel_dim=channel_dim
        )
        if num_classes == 1:
            warnings.warn(
                "num_classes: got 1, want at least 2 to tell apart: every image is of the one"
                " class, whatever the filters see",
                stacklevel=2,
            )
        self.num_classes, self.num_filters = num_classes, num_filters
        self.channel_dim = channel_dim
        self.features = features
        self.head = head

    @classmethod
    def on_backbone(
        cls,
        backbone: Any,
        *,
        num_classes: int,
        layer: str | None = None,
        num_filters: int | None = None,
        insert_conv: bool = True,
        in_channels: int | None = None,
        image_channels: int | None = None,
        weights: Any = None,
        stem: Literal["default", "cifar"] = "default",
        **options: Any,
    ) -> Self:
        """The method on a backbone, whose classifier is made anew; see ``make_interpretable``.

        A method that makes something else of a backbone says so here.
        """
        parts = parts_on_backbone(
            backbone,
            filters_per_class=cls.filters_per_class if insert_conv else None,
            takes_channel_dim="channel_dim" in inspect.signature(cls).parameters,
            num_classes=num_classes,
            layer=layer,
            num_filters=num_filters,
            insert_conv=insert_conv,
            in_channels=in_channels,
            image_channels=image_channels,
            weights=weights,
            stem=stem,
            options=options,
        )
        return cls(*parts[:-1], **parts.options)

    @abc.abstractmethod
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """A named tuple of the method's own, with at least ``logits`` ``[B, K]`` and ``maps``.

        Args:
            images: ``[B, C, H, W]``, whatever ``features`` take.
            labels: ``[B]`` integers; used by methods that select filters by the true label alone.
        """

    @abc.abstractmethod
    def loss_terms(self, output: Any, labels: Tensor) -> dict[str, Tensor]:
        """The terms of the loss by name, scalars, each weighted as it enters the sum.

        Args:
            output: of ``forward``.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: labels that are not integers.
            ValueError: labels of another shape or out of range, or an output of another model.
        """

    def loss(self, output: Any, labels: Tensor) -> Tensor:
        """The sum of ``loss_terms``: a scalar, float32 or wider."""
        return torch.stack(list(self.loss_terms(output, labels).values())).sum()

    def filter_maps(self, images: Tensor) -> Tensor:
        """Maps as the head takes them, ``[B, N, h, w]`` or as ``channel_dim`` says."""
        maps: Tensor = self.features(images)
        self.masked_head.check_maps(maps)
        return maps

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """``filter_maps``, and what reaches the head past the filters, with most methods None."""
        return self.filter_maps(images), None

    def head_logits(
        self, maps: Tensor, mask: Tensor | None = None, bypass: Tensor | None = None
    ) -> Tensor:
        """The head's logits ``[B, K]`` on the maps, each channel scaled by its mask.

        Args:
            maps: of ``filter_maps``; never written to.
            mask: ``[B, N]`` in [0, 1], any dtype, differentiable; None keeps every filter.
            bypass: what ``encode`` yields beside the maps; with most methods there is nothing.
        """
        return self.masked_head(self.head, maps, mask)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimiser groups, each with a ``name`` and its rate; decay where it is a group's own.

        The network's rate is ``lr`` >= 0, e.g. 1e-3 with Adam.
        """
        lr = checks.non_negative("lr", lr)
        return [{"params": list(self.parameters()), "lr": lr, "name": "network"}]

    def optimizers(self, lr: float) -> dict[str, list[dict[str, Any]]]:
        """Groups of each optimiser by name: one, but for methods whose epochs take turns."""
        return {"network": self.parameter_groups(lr)}

    def optimizer_of(self, epoch: int, epochs: int | None = None) -> str:
        """The name of the optimiser that steps in this epoch, from 1, of so many."""
        return "network"

    def begin_epoch(
        self,
        epoch: int,
        batches: int | None = None,
        epochs: int | None = None,
        *,
        images: Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Told by the training loop before each epoch, which count from 1.

        Args:
            epoch: from 1.
            batches: of the epoch on each rank; None where that is not known beforehand.
            epochs: of the run; None where that is not known beforehand.
            images: the training images and their labels in batches, better not augmented, on any
                device; of several ranks each has its share. Iterated only by a method that wants
                them, in the epochs in which it does: the loader that is trained on will do.
        """
        checks.integer("epoch", epoch, 1)
        for name, value in (("batches", batches), ("epochs", epochs)):
            if value is not None:
                checks.integer(name, value, 1)

    def after_step(self) -> None:
        """Told by the training loop after each step of the optimiser."""

    def logged(self) -> dict[str, Tensor]:
        """Scalars of the method's own to log after each epoch, by name."""
        return {}

    def remarks(self) -> list[str]:
        """What a user should be told when training is over."""
        return []

    def ownership(self) -> Tensor | None:
        """Which filter stands for which class: ``[K, N]`` in [0, 1], without gradient, or None."""
        return None

    def class_mask(
        self, labels: Tensor, *, seed: int | Tensor | None = None, rank: int | None = None
    ) -> Tensor:
        """Draw a Bernoulli mask for the rows of ``ownership`` that belong to ``labels``.

        PICNN eq. 7; ``1 - class_mask(labels)`` is the complement that ACC3 is measured with.

        Args:
            labels: ``[B]`` integers in [0, K), on the model's device.
            seed: as in ``functional.bernoulli_mask``: None draws one from torch's generator. A
                seed fixes the draws by position in the batch: give each batch its own.
            rank: as there: None is that of the process, so that processes draw apart.

        Returns:
            ``[B, N]`` of 0 and 1, float32 or wider, without gradient.

        Raises:
            TypeError, ValueError: labels that are no class indices; filters that belong to none.
        """
        probabilities = self.ownership()
        if probabilities is None:
            raise ValueError(f"class_mask: {type(self).__name__} gives no filter to a class")
        return draw_mask(probabilities, labels, seed=seed, rank=rank, validate=False)

    def performer(self) -> Performer | None:
        """The trained network that this one explains, or None: it explains itself."""
        return None

    def discriminator(self) -> nn.Module:
        """The plain network to deploy, images to logits.

        It holds the same modules, not copies, under the same names ``features`` and ``head``: its
        state dict loads into the same network built anywhere, without picnn_fast (but for mask
        layers that belong to the network, as an ICNN's). Deepcopy it to keep training the original.
        """
        network = nn.Sequential()
        network.add_module("features", self.features)
        network.add_module("head", self.head)
        network.training = self.training
        return network

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        class_names: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the network in a folder: ``model.safetensors`` and a card, ``config.json``.

        The card says how the network is built again: method and options, backbone, versions. What
        is left out of what follows is as on the card that the network was loaded with, if any.

        Args:
            folder: to make, or to write over.
            class_names: one a class.
            preprocessing: how images become what it takes, as ``Preprocessing.as_dict()`` says it:
                "image_size", "mean", "std" and more.
            notes: what else to tell, of JSON's types.

        Raises:
            ValueError: a network that ``make_interpretable`` did not make, an option that JSON has
                no way to tell, such as a function, or other than K class names.
            ImportError: safetensors is not installed.

        Example:
            >>> import tempfile
            >>> import picnn_fast
            >>> network = picnn_fast.make_interpretable("small-cnn", "picnn", num_classes=2)
            >>> folder = tempfile.mkdtemp()
            >>> network.save_pretrained(folder, class_names=["cat", "dog"])
            >>> picnn_fast.PICNN.from_pretrained(folder).card["class_names"]
            ['cat', 'dog']
        """
        from picnn_fast.models import pretrained

        pretrained.save(
            self, folder, class_names=class_names, preprocessing=preprocessing, notes=notes
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, backbone: Any = None) -> Self:
        """The network that ``save_pretrained`` saved in a folder, in eval mode, on the CPU.

        Nothing is downloaded, and no code of the folder's is run.

        Args:
            folder: on this machine.
            backbone: the module, or the pair of modules, that the method was put on, where that was
                no name: with any weights; its layers are used in place.

        Raises:
            FileNotFoundError: the folder holds no such network.
            ValueError: another method than that of the class, a backbone that is missing or not
                wanted, a card of a newer version, or files that are damaged.
            ImportError: safetensors is not installed, or what the backbone comes from.
        """
        from picnn_fast.models import pretrained

        network = pretrained.load(cls, folder, backbone=backbone)
        assert isinstance(network, cls)
        return network

    def extra_repr(self) -> str:
        sizes = {"num_classes": self.num_classes, "num_filters": self.num_filters}
        return ", ".join(f"{k}={v!r}" for k, v in {**sizes, **self.options()}.items())

    def options(self) -> Mapping[str, object]:
        """The method's own options, as they were given, for ``repr``."""
        return {}
