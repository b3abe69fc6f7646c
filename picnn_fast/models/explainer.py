"""Explainer: a network beside a trained one, that tells its features again by object parts."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast.backbones import Split, cut, split
from picnn_fast.functional import filter_loss
from picnn_fast.layers import TemplateMask, inserted_convolution
from picnn_fast.losses import check_output, cross_entropy
from picnn_fast.models.base import InterpretableNetwork, Performer, check_task
from picnn_fast.models.masked_head import MaskedHead, layers_of, leading_pooling
from picnn_fast.ops.layout import whole
from picnn_fast.ops.templates import PartTemplate, check_template

OBJECTIVES = ("reconstruction", "classification")
TASKS = ("softmax", "single")
# Of the filter losses' gradients to that of the objective, in the first epoch.
GRADIENT_SHARE = 1 / 300


class ExplainerOutput(NamedTuple):
    """What a forward pass yields.

    Attributes:
        logits: ``[B, K]``, the performer's classifier on what was reconstructed.
        maps: of conv-interp-2, masked, ``[B, N, h, w]``.
        activations: of conv-interp-1 and conv-interp-2 before their mask layers.
        mixed: p·x_f + (1 - p)·x_ordin of the last one, both normalised, ``[B, N, h, w]``: what its
            filter loss is taken of.
        reconstructed: of fc-dec-1 and fc-dec-2, each ``[B, D]``.
        targets: what the performer has there.
    """

    logits: Tensor
    maps: Tensor
    activations: tuple[Tensor, Tensor]
    mixed: Tensor
    reconstructed: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]


class RunningMean(nn.Module):
    """Means of values over all images seen in training, constants in the backward pass.

    Args:
        width: how many values an image has.
    """

    mean: Tensor
    images: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(width))
        # Not an integer, of which averages of weights can make no mean, and no scalar: torch 2.11
        # loses what a compiled step writes to one in double precision.
        self.register_buffer("images", torch.zeros(1))

    @torch.no_grad()
    def update(self, values: Tensor, shown: Tensor | None = None) -> None:
        """Take in values ``[B, width]``, of the images alone that ``shown``, ``[B]`` bool, says."""
        # Single precision at least, whatever ``half()`` made of the buffers: sums would overflow.
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        self.mean, self.images = self.mean.to(dtype), self.images.to(dtype)
        values = values.detach().to(dtype)
        share = values.new_ones(len(values)) if shown is None else shown.to(dtype)
        count = share.sum()
        new = (values * share[:, None]).sum(0) / count.clamp_min(1)
        step = count / (self.images + count).clamp_min(1)
        self.mean.copy_(torch.where(count > 0, self.mean.lerp(new, step), self.mean))
        self.images.add_(count)

    def reciprocal(self) -> Tensor:
        """1 / mean ``[width]``, and 0 where the mean is 0: such a value is 0 on every image."""
        return torch.where(self.mean > 0, 1 / self.mean, 0.0)


class NormLayer(RunningMean):
    """Divides every channel by alpha, the mean over all images of its sum of max(x, 0).

    A mean that forgets, as batch norm's, would follow maps that shrink, and as alpha is a constant
    of the gradient nothing else holds them: reconstruction gets worse from epoch to epoch then.

    Args:
        width: channels of the maps.
    """

    def observe(self, maps: Tensor, shown: Tensor | None = None) -> None:
        """Take in maps ``[B, channels, h, w]``; see ``update``."""
        self.update(channel_sums(maps), shown)

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, channels, h, w]`` to the same shape."""
        return maps * self.reciprocal()[:, None, None]


def channel_sums(maps: Tensor) -> Tensor:
    """Sums over positions of max(x, 0): ``[B, N, h, w]`` to ``[B, N]``, float32 or wider."""
    maps = maps.detach().clamp_min(0)
    return maps.sum((2, 3), dtype=torch.promote_types(maps.dtype, torch.float32))


class Decoder(nn.Module):
    """Both tracks mixed, and inverted to what the performer has in its fully connected layers.

    Args:
        upper: of the performer.
        num_filters: N, channels of either track.

    Attributes:
        w_p: ``[1]``, p is its sigmoid.
        norm: norm layer of the interpretable track.
        scale: mean channel sums of the performer's own maps, which fc-dec-1 stands behind: its
            weights are those of fc6, made for such maps.
    """

    def __init__(self, upper: "_Upper", num_filters: int) -> None:
        super().__init__()
        self.w_p = nn.Parameter(torch.zeros(1))  # not a scalar, which fully_shard refuses
        self.norm = NormLayer(num_filters)
        self.scale = RunningMean(num_filters)
        self.front = upper.front
        self.fc1 = _decoder_of(upper, num_filters)
        self.act1 = upper.act1 if upper.fc6 is not None else nn.ReLU()
        self.fc2 = nn.Linear(
            upper.fc7.in_features, upper.fc7.out_features, bias=upper.fc7.bias is not None
        )
        self.fc2.load_state_dict(upper.fc7.state_dict())
        self.act2, self.classifier = upper.act2, upper.classifier

    def p(self) -> Tensor:
        """Share of the interpretable track, a scalar."""
        return whole(self.w_p).sigmoid().squeeze()

    def mix(self, interpretable: Tensor, ordinary: Tensor) -> Tensor:
        """x_enc, of normalised maps ``[B, N, h, w]``."""
        return self.p() * interpretable + (1 - self.p()) * ordinary

    def decode(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """What fc-dec-1 and fc-dec-2 make of x_enc."""
        # A copy: the mean may be renewed before the backward pass.
        first = self.act1(self.fc1(self.front(encoded * self.scale.mean.clone()[:, None, None])))
        return first, self.act2(self.fc2(first))

    def forward(self, maps: Tensor, ordinary: Tensor) -> Tensor:
        """Logits, of the interpretable maps after their mask and the normalised ordinary ones."""
        logits: Tensor = self.classifier(self.decode(self.mix(self.norm(maps), ordinary))[1])
        return logits


class Explained(nn.Module):
    """The performer with its features replaced by what the explainer reconstructs.

    Args:
        features: images by way of ``target`` to the interpretable maps.
        ordinary: maps of ``target`` to those of the ordinary track.
        head: both to logits.
    """

    def __init__(self, features: nn.Sequential, ordinary: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.ordinary, self.head = features, ordinary, head

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, K]``."""
        first, *others = self.features.children()
        target = maps = first(images)
        for layer in others:
            maps = layer(maps)
        logits: Tensor = self.head(maps, self.ordinary(target))
        return logits


class Explainer(InterpretableNetwork):
    """An explainer of a trained network, the performer, which stays as it is.

    Attached to the performer's maps at a target layer, it tells them again by an interpretable
    track, conv-interp-1 and conv-interp-2 with mask layers and filter losses, and an ordinary
    track, conv-ordin, to which p leaves a share of 1 - p. Its decoder, fc-dec-1 and fc-dec-2,
    reconstructs from both what the performer has in fc6 and fc7 after their activations; the
    performer's classifier follows. A performer with less than two hidden fully connected layers has
    its logits reconstructed, and before them its hidden layer, or its pooled features.

    Loss, eq. 1, all weights divided by 5e4 = the sum over both of |x - x*|² / E|x*|, - eta·log p,
    and the sum over both convolutions and their filters of lambda·Loss_f, exact over each batch.
    lambda = E|d objective / d x_f| / E|d Loss_f / d x_f| / (300·epoch), renewed with every step;
    x_f are the maps before the mask. In evaluation it is that of the last step.

    Norm layers, and E|x*|, are running means over all images, renewed in training and constant in
    the backward pass. In ``train()`` the performer's batch norm and dropout stay in evaluation
    mode, and its parameters, which are in the state dict, are frozen: its own modules are used, not
    copies.

    What is deployed, ``discriminator()``, is the performer with its features replaced by the
    explainer's reconstruction, and ``logits`` are its logits. ``head_logits`` wants the ordinary
    track, too, which ``encode`` yields.

    Args:
        features: the performer from the images to the maps of the target layer.
        head: the rest of the performer, layers one after the other in an ``nn.Sequential``: best
            its top convolution with its activation, poolings, and fully connected layers.
        num_classes: K.
        num_filters: N of every convolution of the explainer; best as many as the performer's top
            convolution has, for what is copied is copied where it fits.
        in_channels: channels of ``features``; None: ``num_filters``.
        objective: what is explained for: "reconstruction" of the performer's features; or
            "classification", cross entropy in its place (the paper's Explainer+cls, a bound on what
            features of such a shape can tell).
        template: the shape of a part, of the mask layers and filter losses; None is the paper's,
            ``PartTemplate()``.
        eta: weight of -log p; the paper's is 20, and 3 for VGG-16.
        task: "softmax": several categories; "single": one category, label 1, against the rest:
            norm layers take their means of its images alone (K = 2).
        p_lr: learning rate of the one number that p is made of; at the network's it would take
            thousands of steps.
        performer: of ``picnn-fast train``: folder or checkpoint of the run whose network is
            explained.

    Raises:
        TypeError, ValueError: see ``InterpretableNetwork``; a performer without fully connected
            layers one after the other behind the target layer.

    Note:
        In ``forward``, hooks on ``features`` itself do not run, hooks on its layers do.
        ``torch.compile(fullgraph=True)`` of a training step wants
        ``torch._dynamo.config.trace_autograd_ops = True``, for lambda is made of gradients.

    Source:
        Zhang, Yang, Liu, Wu, Zhu, "Unsupervised Learning of Neural Networks to Explain Neural
        Networks", 2018, section 3 and the appendix, whose sign of the filter loss's gradient is
        the wrong one. Pooling in both tracks, the place of the masks, p_lr, and that x_f is
        normalised where it is mixed with the ordinary track, are ours.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from picnn_fast.models import make_interpretable
        >>> performer = nn.Sequential(
        ...     nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        ...     nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 49, 16), nn.ReLU(),
        ...     nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4),
        ... )
        >>> model = make_interpretable(performer, "explainer", num_classes=4)
        >>> images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
        >>> output = model(images, labels)
        >>> model.loss(output, labels).backward()
        >>> output.maps.shape, [tuple(x.shape) for x in output.reconstructed]
        (torch.Size([2, 8, 7, 7]), [(2, 16), (2, 16)])
        >>> performer[0].weight.grad is None
        True
    """

    filters_per_class: ClassVar[float | None] = None
    network_from: ClassVar[str | None] = "performer"
    compiles_alone: ClassVar[bool] = False  # lambda
    epoch: Tensor
    filter_weights: Tensor

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        num_classes: int,
        num_filters: int,
        *,
        in_channels: int | None = None,
        objective: Literal["reconstruction", "classification"] = "reconstruction",
        template: PartTemplate | None = None,
        eta: float = 20.0,
        task: Literal["softmax", "single"] = "softmax",
        p_lr: float = 0.01,
        performer: str | Path | None = None,
    ) -> None:
        checks.module("features", features)
        checks.module("head", head)
        checks.integer("num_classes", num_classes, 1)
        checks.integer("num_filters", num_filters, 1)
        channels = num_filters
        if in_channels is not None:
            channels = checks.integer("in_channels", in_channels, 1)
        template = PartTemplate() if template is None else check_template(template)
        upper = _split(head, channels)
        track = nn.Sequential(
            OrderedDict(
                target=features,
                conv1=_like_the_top(upper.top, channels, num_filters),
                relu1=nn.ReLU(),
                mask1=TemplateMask(template),
                conv2=inserted_convolution(num_filters, num_filters, 3),
                relu2=nn.ReLU(),
                pool=upper.pool,
                mask2=TemplateMask(template),
            )
        )
        super().__init__(
            track, Decoder(upper, num_filters), num_classes, num_filters, mask_at="maps"
        )
        self.ordinary = nn.Sequential(
            OrderedDict(
                conv=inserted_convolution(channels, num_filters, 3),
                relu=nn.ReLU(),
                pool=upper.pool,
                norm=NormLayer(num_filters),
            )
        )
        # What of the performer its features are reconstructed by; the rest is in the decoder.
        self.top, self.fc7 = upper.top, upper.fc7
        self.fc6 = nn.Identity() if upper.fc6 is None else upper.fc6
        self.target_norms = RunningMean(2)
        self._channels = channels, upper.channels
        self._hidden = upper.fc6 is not None
        self._target = MaskedHead(head, num_classes, channels, mask_at="maps")
        self.objective = checks.one_of("objective", objective, OBJECTIVES)
        self.template = template
        self.eta = checks.non_negative("eta", eta)
        self.task = check_task(task, TASKS, num_classes)
        self.p_lr = checks.positive("p_lr", p_lr)
        self.path = performer
        # A tensor: a compiled step would be compiled anew for each number.
        self.register_buffer("epoch", torch.tensor(1))
        self.register_buffer("filter_weights", torch.zeros(2, num_filters))
        for part in self._frozen():
            part.requires_grad_(False)
        self.train()

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
        """An explainer of the whole backbone as it is, its classifier included.

        Args:
            backbone: see ``make_interpretable``: a trained module; an interpretable network, of
                which its ``discriminator()`` is explained; a pair; or a name, whose classifier is
                made anew, as all names' are.
            num_classes: K of the performer.
            layer: target layer, a name of the performer's ``named_modules()`` (those of a pair, a
                name or an interpretable network begin with "features." or "head."). None: what the
                last convolution takes, or, where that is not to be had by itself, as in a residual
                network, where the backbone is cut by default.
            num_filters: N. None: as many as the performer's last convolution behind the target
                layer has, or as its maps.
            insert_conv: without a meaning here: the explainer has convolutions of its own.
            in_channels: of the maps of the target layer, where only running the performer can tell.
            image_channels, weights, stem: for a name.
            **options: of the class.
        """
        parts = _at_layer(*_whole(backbone, num_classes, image_channels, weights, stem), layer)
        if not isinstance(parts.classifier, list):
            raise ValueError(
                f"layer: got {parts.layer!r}, behind which the performer branches, want a layer"
                " that others follow one after the other"
            )
        head = nn.Sequential(*parts.classifier)
        convolutions = _convolutions(layers_of(head))
        pair = isinstance(backbone, tuple | list)
        if in_channels is None and convolutions:
            in_channels = convolutions[0].in_channels
        if in_channels is None:
            in_channels = num_filters if pair else parts.channels()
        if in_channels is None:
            raise ValueError(
                f"in_channels: got None, want the channels that layer {parts.layer!r} yields: only"
                " running the performer can tell"
            )
        if num_filters is None:
            num_filters = convolutions[-1].out_channels if convolutions else in_channels
        options = {**options, "in_channels": in_channels}
        return cls(parts.features, head, num_classes, num_filters, **options)

    def _frozen(self) -> list[nn.Module]:
        """The performer's parts."""
        decoder = self.decoder
        parts = [self.track["target"], self.top, self.track["pool"], self.fc6, self.fc7]
        return [*parts, decoder.front, decoder.act1, decoder.act2, decoder.classifier]

    @property
    def track(self) -> dict[str, nn.Module]:
        """The layers of the interpretable track by name."""
        return dict(self.features.named_children())

    @property
    def decoder(self) -> Decoder:
        """The head, as what it is."""
        assert isinstance(self.head, Decoder)
        return self.head

    def train(self, mode: bool = True) -> Self:
        """See ``torch.nn.Module``; the performer stays in evaluation mode."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor | None = None) -> ExplainerOutput:
        """Logits, maps, and what the loss is made of.

        Args:
            images: ``[B, C, H, W]``, whatever the performer takes.
            labels: ``[B]`` integers; of ``task="single"``, in training, where None counts all
                images as the category's.
        """
        track, decoder = self.track, self.decoder
        target = track["target"](images)
        self._target.check_maps(target)
        first = track["relu1"](track["conv1"](target))
        second = track["pool"](track["relu2"](track["conv2"](track["mask1"](first))))
        maps = track["mask2"](second)
        self.masked_head.check_maps(maps)
        conv, relu, pool, norm = self.ordinary
        assert isinstance(norm, NormLayer)
        ordinary = pool(relu(conv(target)))
        features, performed = self._performed(target)
        if self.training:
            checks.not_recomputed("Explainer.forward")
            shown = None if labels is None or self.task != "single" else labels == 1
            decoder.norm.observe(maps, shown)
            norm.observe(ordinary, shown)
            decoder.scale.update(self._sums(features))
            self.target_norms.update(torch.stack([_norms(x) for x in performed], 1))
        ordinary = norm(ordinary)
        reconstructed = decoder.decode(decoder.mix(decoder.norm(maps), ordinary))
        logits = self.masked_head.checked_logits(decoder.classifier(reconstructed[1]), maps)
        mixed = decoder.mix(decoder.norm(second), ordinary.detach())
        return ExplainerOutput(logits, maps, (first, second), mixed, reconstructed, performed)

    def _performed(self, target: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Of the performer: its pooled maps, and fc6 and fc7 after their activations."""
        decoder = self.decoder
        # A convolution makes maps of its own; another layer may write to those of the target.
        own = target.detach() if _convolutions(self.top) else target.detach().clone()
        features = self.track["pool"](self.top(own))
        first = self.fc6(decoder.front(features))
        first = decoder.act1(first) if self._hidden else first
        return features, (first, decoder.act2(self.fc7(first)))

    def _sums(self, features: Tensor) -> Tensor:
        """Channel sums of the performer's maps ``[B, N]``, those of other numbers averaged."""
        sums = channel_sums(features)
        if sums.shape[1] == self.num_filters:
            return sums
        return sums.mean(1, keepdim=True).expand(-1, self.num_filters)

    def loss_terms(self, output: ExplainerOutput, labels: Tensor) -> dict[str, Tensor]:
        """``reconstruction`` or ``classification``, ``interpretable`` and ``filter_loss``.

        Args:
            output: of ``forward``.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError, ValueError: see ``InterpretableNetwork``.
            RuntimeError: computed again by ``torch.utils.checkpoint``, in training.
        """
        check_output(output, ExplainerOutput, labels, self.num_classes)
        if self.objective == "reconstruction":
            objective = self._reconstruction(output)
        else:
            objective = cross_entropy(output.logits, labels).mean()
        inputs = (output.activations[0], output.mixed)
        losses = torch.stack([filter_loss(maps, self.template) for maps in inputs])
        if self.training and objective.requires_grad:
            checks.not_recomputed("Explainer.loss_terms")
            self.filter_weights = self.filter_weights.to(losses.dtype)
            self.filter_weights.copy_(self._weights(objective, losses, output.activations))
        return {
            self.objective: objective,
            "interpretable": -self.eta
            * nn.functional.logsigmoid(whole(self.decoder.w_p)).squeeze(),
            "filter_loss": (self.filter_weights.clone() * losses).sum(),
        }

    def _reconstruction(self, output: ExplainerOutput) -> Tensor:
        """The sum over fc6 and fc7 of |x - x*|² / E|x*|, the mean over images."""
        terms = [
            checks.accumulable(got - want).square().sum(1).mean()
            for got, want in zip(output.reconstructed, output.targets, strict=True)
        ]
        return (torch.stack(terms) * self.target_norms.reciprocal()).sum()

    def _weights(
        self, objective: Tensor, losses: Tensor, activations: tuple[Tensor, ...]
    ) -> Tensor:
        """lambda of both convolutions and their filters, ``[2, N]``."""
        upper = torch.autograd.grad(objective, activations, retain_graph=True)
        weights = []
        for layer, maps in enumerate(activations):
            (own,) = torch.autograd.grad(losses[layer].sum(), maps, retain_graph=True)
            wanted, got = (
                _norms(x.flatten(0, 1)).view(x.shape[:2]).mean(0) for x in (upper[layer], own)
            )
            # Of a filter that is off the gradient is 0, or what rounding makes of that.
            least = torch.finfo(got.dtype).eps * self.template.tau_for(*maps.shape[2:])
            weights.append(torch.where(got > least, wanted / got, 0.0))
        return torch.stack(weights) * GRADIENT_SHARE / self.epoch

    def begin_epoch(
        self,
        epoch: int,
        batches: int | None = None,
        epochs: int | None = None,
        *,
        images: Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Lambda falls with the epoch; see ``InterpretableNetwork``."""
        super().begin_epoch(epoch, batches, epochs, images=images)
        self.epoch.fill_(epoch)

    def filter_maps(self, images: Tensor) -> Tensor:
        """Maps of conv-interp-2 after its mask layer, ``[B, N, h, w]``."""
        return self._track(images)[1]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``filter_maps``, and the normalised maps of the ordinary track, of the same shape."""
        target, maps = self._track(images)
        return maps, self.ordinary(target)

    def _track(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of the target layer, and of the interpretable track.

        ``features`` run as one, so that hooks on them do, and are looked into on their way.
        """
        seen = []

        def look(_: nn.Module, __: object, target: Tensor) -> None:
            self._target.check_maps(target)
            seen.append(target)

        handle = self.track["target"].register_forward_hook(look)
        try:
            maps: Tensor = self.features(images)
        finally:
            handle.remove()
        self.masked_head.check_maps(maps)
        return seen[0], maps

    def head_logits(
        self, maps: Tensor, mask: Tensor | None = None, bypass: Tensor | None = None
    ) -> Tensor:
        """See ``InterpretableNetwork``.

        Raises:
            ValueError: no ``bypass``: the ordinary track, which ``encode`` yields.
        """
        self.masked_head.check_maps(maps)
        masked = self.masked_head.masked(maps, mask)
        if bypass is None:
            raise ValueError("bypass: got None, want what encode(images) yields beside the maps")
        return self.masked_head.checked_logits(self.head(masked, bypass), maps)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """What learns, and p's number apart, named "p", at a rate of its own and without decay."""
        lr = checks.non_negative("lr", lr)
        w_p = self.decoder.w_p
        network = [x for x in self.parameters() if x.requires_grad and x is not w_p]
        own = {"params": [w_p], "lr": self.p_lr, "weight_decay": 0.0, "name": "p"}
        return [{"params": network, "lr": lr, "name": "network"}, own]

    def logged(self) -> dict[str, Tensor]:
        """``p``, every epoch."""
        return {"p": self.decoder.p().detach()}

    def performer(self) -> Performer:
        """The network that is explained, of its own modules."""
        decoder, top = self.decoder, self.top
        hidden = [self.fc6, decoder.act1] if self._hidden else []
        after = [*hidden, self.fc7, decoder.act2, decoder.classifier]
        rest = [self.track["pool"], decoder.front, *after]
        known = bool(_convolutions(top))
        return Performer(
            self.track["target"],
            top if known else None,
            nn.Sequential(*rest) if known else nn.Sequential(top, *rest),
            *self._channels,
        )

    def discriminator(self) -> Explained:
        """The performer with its features replaced by the reconstruction, images to logits.

        It holds the same modules, not copies, under the same names ``features``, ``ordinary`` and
        ``head``; deepcopy it to keep training the original.
        """
        assert isinstance(self.features, nn.Sequential)
        network = Explained(self.features, self.ordinary, self.head)
        network.training = self.training
        return network

    def options(self) -> Mapping[str, object]:
        return {"objective": self.objective, "task": self.task, "eta": self.eta, "of": self.path}


def _norms(values: Tensor) -> Tensor:
    """L2 norms of all that each first index holds, float32 or wider."""
    norms: Tensor = torch.linalg.vector_norm(checks.accumulable(values.detach()).flatten(1), dim=1)
    return norms


class _Upper(NamedTuple):
    """A performer behind its target layer.

    Attributes:
        top: up to its poolings: the top convolution and its activation, where there is one.
        pool: poolings of a window; both tracks have them, too.
        front: what follows them, up to the first fully connected layer.
        fc6: the first such layer, or None where there is one alone, the classifier.
        act1: what follows it.
        fc7: the second such layer, or the one alone.
        act2: what follows it.
        classifier: what is left.
        channels: of the top's maps.
    """

    top: nn.Sequential
    pool: nn.Sequential
    front: nn.Sequential
    fc6: nn.Linear | None
    act1: nn.Sequential
    fc7: nn.Linear
    act2: nn.Sequential
    classifier: nn.Sequential
    channels: int


def _convolutions(layers: Iterable[nn.Module]) -> list[nn.Conv2d]:
    return [layer for layer in layers if isinstance(layer, nn.Conv2d)]


def _split(head: nn.Module, channels: int) -> _Upper:
    """The parts of a performer's head, which takes maps of so many channels."""
    layers = layers_of(head)
    linear = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if not linear:
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise ValueError(
            f"head: got no nn.Linear among its layers ({kinds}), want fully connected layers, one"
            " after the other in an nn.Sequential"
        )
    before = layers[: linear[0]]
    above = max((i + 1 for i, x in enumerate(before) if isinstance(x, nn.Conv2d)), default=0)
    start = next(
        (
            i
            for i in range(above, len(before))
            if leading_pooling(before[i]) or isinstance(before[i], nn.Flatten)
        ),
        len(before),
    )
    convolutions = _convolutions(before)
    channels = convolutions[-1].out_channels if convolutions else channels
    pooled = start
    for i in range(start, start + leading_pooling(nn.Sequential(*before[start:]))):
        if isinstance(before[i], nn.MaxPool2d | nn.AvgPool2d):
            pooled = i + 1
    first, second = linear[:2] if len(linear) > 1 else (None, linear[0])
    end = linear[2] if len(linear) > 2 else len(layers)
    fc6, fc7 = None if first is None else layers[first], layers[second]
    assert fc6 is None or isinstance(fc6, nn.Linear)
    assert isinstance(fc7, nn.Linear)
    return _Upper(
        top=nn.Sequential(*before[:start]),
        pool=nn.Sequential(*before[start:pooled]),
        front=nn.Sequential(*before[pooled:]),
        fc6=fc6,
        act1=nn.Sequential(*([] if first is None else layers[first + 1 : second])),
        fc7=fc7,
        act2=nn.Sequential(*layers[second + 1 : end]),
        classifier=nn.Sequential(*layers[end:]),
        channels=channels,
    )


def _like_the_top(top: nn.Sequential, channels: int, num_filters: int) -> nn.Conv2d:
    """conv-interp-1, with the weights of the performer's top convolution where they fit."""
    conv = inserted_convolution(channels, num_filters, 3)
    layers = [*top, nn.Identity(), nn.Identity()]
    old, norm = layers[:2]
    if not isinstance(old, nn.Conv2d) or old.weight.shape != conv.weight.shape:
        return conv
    bias = old.weight.new_zeros(num_filters) if old.bias is None else old.bias
    weight, bias = old.weight.detach(), bias.detach()
    if isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None:
        # As one convolution: what batch norm does in evaluation.
        assert norm.running_mean is not None
        gain = (norm.running_var + norm.eps).rsqrt()
        shift = torch.zeros_like(gain)
        if norm.affine:
            gain, shift = gain * norm.weight.detach(), norm.bias.detach()
        weight, bias = weight * gain[:, None, None, None], (bias - norm.running_mean) * gain + shift
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv


def _decoder_of(upper: _Upper, num_filters: int) -> nn.Linear:
    """fc-dec-1, with the weights of fc6 where they fit, or else those that pass pooled features."""
    wanted = upper.fc7 if upper.fc6 is None else upper.fc6
    positions, left_over = divmod(wanted.in_features, upper.channels)
    if left_over:
        raise ValueError(
            f"head: got a fully connected layer of {wanted.in_features} features behind maps of"
            f" {upper.channels} channels, want so many features of each of these"
        )
    out = wanted.in_features if upper.fc6 is None else wanted.out_features
    new = nn.Linear(positions * num_filters, out)
    if num_filters == upper.channels:
        with torch.no_grad():
            if upper.fc6 is None:
                nn.init.eye_(new.weight)
                nn.init.zeros_(new.bias)
            else:
                new.weight.copy_(wanted.weight)
                nn.init.zeros_(new.bias) if wanted.bias is None else new.bias.copy_(wanted.bias)
    return new


def _whole(
    backbone: Any,
    num_classes: int,
    image_channels: int | None,
    weights: Any,
    stem: Literal["default", "cifar"],
) -> tuple[nn.Module, str | None]:
    """A performer, and the layer at which it is explained if its last convolution cannot be."""
    if isinstance(backbone, str):
        parts = cut(backbone, image_channels=image_channels, weights=weights, stem=stem)
        channels = parts.channels()
        assert channels is not None
        backbone = parts.features, parts.head(channels, channels, num_classes)
    else:
        checks.left_out(
            "a performer that is built",
            image_channels=(image_channels, None),
            weights=(weights, None),
            stem=(stem, "default"),
        )
    if isinstance(backbone, InterpretableNetwork):
        if backbone.num_classes != num_classes:
            raise ValueError(
                f"num_classes: got {num_classes}, want {backbone.num_classes}, the performer's"
            )
        return backbone.discriminator(), "features"
    if isinstance(backbone, tuple | list) and len(backbone) == 2:
        for name, part in zip(("features", "head"), backbone, strict=True):
            checks.module(name, part)
        return nn.Sequential(
            OrderedDict(zip(("features", "head"), backbone, strict=True))
        ), "features"
    checks.module("backbone", backbone)
    return backbone, None


def _at_layer(network: nn.Module, default: str | None, layer: str | None) -> Split:
    """The performer, cut behind its target layer."""
    if layer is not None:
        return split(network, layer)
    below = _below_the_last_convolution(network)
    if below is not None:
        try:
            return split(network, below)
        except ValueError:  # others get round it, as in a residual network
            pass
    return cut(network) if default is None else split(network, default)


def _below_the_last_convolution(network: nn.Module) -> str | None:
    """The name of the layer whose maps the last convolution takes, where names tell."""
    names = [name for name, x in network.named_modules() if isinstance(x, nn.Conv2d)]
    parent, _, own = names[-1].rpartition(".") if names else ("", "", "")
    holder = network.get_submodule(parent)
    children = [name for name, _ in holder.named_children()]
    if type(holder) is not nn.Sequential or own not in children or own == children[0]:
        return None
    return f"{parent}.{children[children.index(own) - 1]}".removeprefix(".")
