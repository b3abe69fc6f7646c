"""The Lightning module that trains and evaluates an interpretable network."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from picnn_fast._extras import extra
from picnn_fast.data.loading import derive_seed
from picnn_fast.functional import bernoulli_mask
from picnn_fast.losses import MutualInformationLoss
from picnn_fast.metrics import MutualInformationScore, PathwayAccuracy
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.ops import checks
from picnn_fast.training.config import DivergenceError

with extra("train"):
    import lightning as L

SCHEDULES = ("cosine", "constant")
# Numbers that keep the draws of training, validation and testing apart.
_TRAIN, _EVALUATE = 0, 1


class InterpretableModule(L.LightningModule):
    """Trains a network such as ``PICNN`` or ``STD``, and measures ACC1, ACC2, ACC3 and MIS.

    AdamW. Logged: ``train/loss`` and its terms ``train/<term>``, ``val/acc1`` … ``val/acc3`` after
    every epoch, and ``test/acc1`` … ``test/acc3`` and ``test/mis``. All random draws follow from
    ``seed``, epoch and rank, so a run that resumes from an epoch's checkpoint ends like one never
    interrupted.

    Args:
        network: the network, also at ``.network``.
        lr: learning rate of the network.
        weight_decay: AdamW's. Groups of parameters with a rate or a decay of their own are the
            network's matter (``parameter_groups``).
        schedule: "cosine" lets both rates fall to 0 over the run, epoch by epoch;
            "constant" keeps them.
        warmup_epochs: over the first of them both rates rise linearly, epoch by epoch.
        mutual_information_weight: of ``MutualInformationLoss`` on the pooled filter maps of each
            batch (of each rank), logged as the term ``train/mutual_information``; 0 leaves it out.
        seed: of the masks drawn in training and in evaluation.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> import lightning as L
        >>> from picnn_fast.data import DigitsDataModule
        >>> from picnn_fast.models import make_interpretable
        >>> from picnn_fast.training.module import InterpretableModule
        >>> network = make_interpretable("small-resnet", num_classes=10)
        >>> trainer = L.Trainer(max_epochs=5)  # doctest: +SKIP
        >>> trainer.fit(InterpretableModule(network), DigitsDataModule())  # doctest: +SKIP
    """

    def __init__(
        self,
        network: InterpretableNetwork,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: str = "cosine",
        warmup_epochs: int = 0,
        mutual_information_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < lr < math.inf:
            raise ValueError(f"lr: got {lr}, want a number > 0")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay: got {weight_decay}, want a number >= 0")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {schedule!r}, want one of {', '.join(SCHEDULES)}")
        self.network = network
        self.lr = lr
        self.weight_decay = weight_decay
        self.schedule = schedule
        self.warmup_epochs = checks.integer("warmup_epochs", warmup_epochs, 0)
        self.mutual_information_weight = checks.non_negative(
            "mutual_information_weight", mutual_information_weight
        )
        self.mutual_information = MutualInformationLoss(network.num_classes)
        self.seed = seed
        self.accuracy = PathwayAccuracy(network.num_classes)
        self.mis = MutualInformationScore(network.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of the discrimination pathway."""
        logits: Tensor = self.network(images).logits
        return logits

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.network.parameter_groups(self.lr), weight_decay=self.weight_decay
        )
        epochs = self.trainer.max_epochs
        if self.schedule == "constant":
            if self.warmup_epochs == 0:
                return optimizer
            scheduler: LRScheduler = ConstantLR(optimizer, factor=1.0)
        elif epochs is None or epochs < 1:
            raise ValueError(f"schedule: 'cosine' with max_epochs={epochs}, want max_epochs >= 1")
        else:
            # By epochs: counting steps would start the workers before a resumed epoch is known.
            falling = max(epochs - self.warmup_epochs, 1)
            scheduler = CosineAnnealingLR(optimizer, T_max=falling)
        if self.warmup_epochs > 0:
            first = 1 / (self.warmup_epochs + 1)
            rise = LinearLR(optimizer, start_factor=first, total_iters=self.warmup_epochs)
            scheduler = SequentialLR(optimizer, [rise, scheduler], milestones=[self.warmup_epochs])
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_train_start(self) -> None:
        # The first epoch after resuming has no on_train_epoch_start.
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(derive_seed(self.seed, _TRAIN, self.current_epoch, self.global_rank))
        batches = self.trainer.num_training_batches
        self.network.begin_epoch(
            self.current_epoch + 1, int(batches) if 0 < batches < math.inf else None
        )

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        self.network.after_step()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        output = self.network(images, labels)
        terms = self.network.loss_terms(output, labels)
        if self.mutual_information_weight > 0:
            pooled = pool(output.maps, self.network.channel_dim)
            information = self.mutual_information(pooled, labels)
            terms["mutual_information"] = self.mutual_information_weight * information
        loss = torch.stack(list(terms.values())).sum()
        if not loss.is_cuda:  # there the look would stall the GPU: once an epoch is enough
            self._check_finite(loss)
        # Means over the epoch, and over ranks.
        by_epoch: dict[str, Any] = {
            "on_step": False,
            "on_epoch": True,
            "sync_dist": True,
            "batch_size": len(labels),
        }
        self.log("train/loss", loss, prog_bar=True, **by_epoch)
        self.log_dict({f"train/{name}": term for name, term in terms.items()}, **by_epoch)
        return loss

    def on_train_epoch_end(self) -> None:
        self._check_finite(self.trainer.callback_metrics["train/loss"])

    def _check_finite(self, loss: Tensor) -> None:
        if not loss.isfinite():
            rates = " or ".join(
                f"{'' if group['name'] == 'network' else group['name'] + '_'}lr ({group['lr']})"
                for group in self.network.parameter_groups(self.lr)
            )
            raise DivergenceError(
                f"train/loss is {loss.item()} in epoch {self.current_epoch + 1}:"
                f" training diverged; lower {rates}, or use precision 32-true"
            )

    def on_validation_epoch_start(self) -> None:
        torch.manual_seed(derive_seed(self.seed, _EVALUATE, self.global_rank))
        self.accuracy.reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self._update_accuracy(self.network.filter_maps(images), labels)

    def on_validation_epoch_end(self) -> None:
        values = {f"val/{name}": value for name, value in self.accuracy.compute().items()}
        self.log_dict(values, prog_bar=True, sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()
        self.mis.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        maps = self.network.filter_maps(images)
        self._update_accuracy(maps, labels)
        self.mis.update(pool(maps, self.network.channel_dim), labels)

    def on_test_epoch_end(self) -> None:
        values = {f"test/{name}": value for name, value in self.accuracy.compute().items()}
        self.log_dict({**values, "test/mis": self.mis.compute()})

    def _update_accuracy(self, maps: Tensor, labels: Tensor) -> None:
        logits, masked, complement = pathway_logits(self.network, maps, labels)
        self.accuracy.update(logits, masked, complement, labels)


def pool(maps: Tensor, channel_dim: int) -> Tensor:
    """Global average pooling to ``[B, N]``, wherever the filter axis is.

    In float32 at least: means rounded to a half type would tie.
    """
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return maps.movedim(channel_dim, 1).flatten(2).mean(-1, dtype=dtype)


def pathway_logits(
    network: InterpretableNetwork, maps: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits behind ACC1, ACC2 and ACC3, each ``[B, K]`` (PICNN, section "Metrics").

    Args:
        network: one that gives filters to classes (``ownership``).
        maps: filter maps ``[B, N, h, w]``.
        labels: true classes ``[B]``.

    Returns:
        Logits of all filters; of a mask drawn for the pseudo-label, itself drawn from the softmax
        of the first; of the complement of a mask drawn for the true label. Draws come from torch's
        generator.
    """
    logits = network.head_logits(maps)
    # Maps of no size: the pseudo-label alone is wanted.
    empty = logits.new_empty(len(logits), network.num_filters, 0)
    ownership = network.ownership()
    assert ownership is not None
    _, _, pseudo_label = bernoulli_mask(empty, logits, ownership)
    masked = network.head_logits(maps, network.class_mask(pseudo_label))
    complement = network.head_logits(maps, 1 - network.class_mask(labels))
    return logits, masked, complement
