"""The Lightning module that trains and evaluates an interpretable network."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from picnn_fast._extras import extra
from picnn_fast.data.loading import derive_seed
from picnn_fast.evaluation import FIGURES, Observation, pool
from picnn_fast.losses import MutualInformationLoss
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.ops import checks

with extra("train"):
    import lightning as L

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
# Numbers that keep the draws of training and validation apart.
_TRAIN, _EVALUATE = 0, 1


class DivergenceError(RuntimeError):
    """Training diverged: the loss is no finite number; the message says what may help."""


class InterpretableModule(L.LightningModule):
    """Trains an interpretable network by the terms of its loss.

    Logged: ``train/loss`` and its terms ``train/<term>``; of the validation images, where there
    are any, ``val/acc1``, and ``val/acc2`` and ``val/acc3`` where filters belong to classes, after
    every epoch. All random draws follow from ``seed``, epoch and rank, so a run that resumes from
    an epoch's checkpoint ends like one never interrupted.

    Args:
        network: the network, also at ``.network``.
        lr: learning rate of the network.
        optimizer: a class of ``torch.optim``, or what else takes groups of parameters. Groups with
            a rate or a decay of their own are the network's matter (``parameter_groups``).
        schedule: "cosine" lets all rates fall over the run, epoch by epoch; "constant" keeps them.
        schedule_floor: share of each rate that the cosine ends at, in [0, 1].
        warmup_epochs: over the first of them all rates rise linearly, epoch by epoch.
        mutual_information_weight: of ``MutualInformationLoss`` on the pooled filter maps of each
            batch (of each rank), logged as the term ``train/mutual_information``; 0 leaves it out.
        seed: of the masks drawn in training and in validation.

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
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = torch.optim.AdamW,
        schedule: Literal["cosine", "constant"] = "cosine",
        schedule_floor: float = 0.0,
        warmup_epochs: int = 0,
        mutual_information_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.lr = checks.positive("lr", lr)
        self.make_optimizer = optimizer
        self.schedule = checks.one_of("schedule", schedule, ("cosine", "constant"))
        if not 0 <= schedule_floor <= 1:
            raise ValueError(f"schedule_floor: got {schedule_floor}, want a number in [0, 1]")
        self.schedule_floor = schedule_floor
        self.warmup_epochs = checks.integer("warmup_epochs", warmup_epochs, 0)
        self.mutual_information_weight = checks.non_negative(
            "mutual_information_weight", mutual_information_weight
        )
        self.mutual_information = MutualInformationLoss(network.num_classes)
        self.seed = seed
        self.figures = nn.ModuleDict(
            {
                name: figure.metric(network, None, 1)
                for name, figure in FIGURES.items()
                if figure.each_epoch and figure.needs(network, None) is None
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of the discrimination pathway."""
        logits: Tensor = self.network(images).logits
        return logits

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.network.parameter_groups(self.lr))
        epochs = self.trainer.max_epochs
        if self.schedule == "cosine" and (epochs is None or epochs < 1):
            raise ValueError(f"schedule: 'cosine' with max_epochs={epochs}, want max_epochs >= 1")

        def share(epoch: int) -> float:
            if epoch < self.warmup_epochs:
                return (epoch + 1) / (self.warmup_epochs + 1)
            if self.schedule == "constant":
                return 1.0
            falling = max((epochs or 0) - self.warmup_epochs, 1)
            cosine = (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / falling)) / 2
            return self.schedule_floor + (1 - self.schedule_floor) * cosine

        # By epochs: counting steps would start the workers before a resumed epoch is known.
        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, share)}

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

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # No loss is computed of what the last step makes of the weights, and they are saved next.
        if self.trainer.is_last_batch:
            images = batch[0].to(next(self.network.parameters()).dtype)
            training = {part: part.training for part in self.network.modules()}
            with torch.no_grad():
                logits = Observation(self.network.eval(), images, batch[1], seed=0).logits
            for part, mode in training.items():
                part.training = mode
            self._check_finite(logits.abs().amax(), "the largest logit after the last step")

    def on_train_epoch_end(self) -> None:
        self._check_finite(self.trainer.callback_metrics["train/loss"])

    def _check_finite(self, value: Tensor, name: str = "train/loss") -> None:
        if not value.isfinite():
            rates = " or ".join(
                f"{'' if group['name'] == 'network' else group['name'] + '_'}lr ({group['lr']})"
                for group in self.network.parameter_groups(self.lr)
            )
            raise DivergenceError(
                f"{name} is {value.item()} in epoch {self.current_epoch + 1}:"
                f" training diverged; lower {rates}, or use precision 32-true"
            )

    def on_validation_epoch_start(self) -> None:
        for metric in self.figures.values():
            metric.reset()  # type: ignore[operator]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        seen = Observation(
            self.network, images, labels, seed=derive_seed(self.seed, _EVALUATE, batch_idx)
        )
        for name, metric in self.figures.items():
            FIGURES[name].update(metric, seen)

    def on_validation_epoch_end(self) -> None:
        for name, metric in self.figures.items():
            value = metric.compute().mean  # type: ignore[operator]
            self.log(f"val/{name}", value, prog_bar=True, sync_dist=True)
