"""The Lightning module that trains and evaluates an interpretable network."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.data.loading import SeededDataModule, derive_seed
from picnn_fast.evaluation import FIGURES, Observation, pool, sharing
from picnn_fast.losses import MutualInformationLoss
from picnn_fast.models.base import InterpretableNetwork, evaluating
from picnn_fast.training.checkpoint import load_checkpoint
from picnn_fast.training.options import check_steps
from picnn_fast.training.progress import WatchesImages
from picnn_fast.training.sharding import ShardedStrategy, shard, whole

with extra("train"):
    import lightning as L
    from lightning.pytorch.callbacks import Timer
    from lightning.pytorch.trainer.states import TrainerFn

# Numbers that keep the draws of training and validation apart.
_TRAIN, _EVALUATE = 0, 1
_WITHIN = "picnn_fast_epoch"  # key of what a checkpoint within an epoch holds of that epoch


class DivergenceError(RuntimeError):
    """Training diverged: the loss is no finite number; the message says what may help."""


def _generators(device: torch.device) -> dict[str, Any]:
    """The states of the generators that training may draw from, of what ``torch.load`` trusts."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    kind, keys, *rest = numpy
    states = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "python": random.getstate(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def _set_generators(states: Mapping[str, Any], device: torch.device) -> None:
    kind, keys, *rest = states["numpy"]
    torch.set_rng_state(states["torch"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])
    if "device" in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"])


class _TrainingImages:
    """What a method reads of the training images before an epoch, if it does: not augmented.

    A data module of ours tells its images as they are; of other data what is trained on is read,
    on every rank all of it.

    Args:
        trainer: in training.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        trainer = self.trainer
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        hooks = trainer.lightning_module if data is None else data
        loader: Any = trainer.train_dataloader
        if isinstance(data, SeededDataModule):
            loader = data.train_images()
        elif isinstance(loader, DataLoader):
            # A loader of its own: one whose workers persist has a single iterator.
            loader = DataLoader(
                loader.dataset,
                batch_size=loader.batch_size,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                generator=torch.Generator(),
            )
        watching = [c for c in trainer.callbacks if isinstance(c, WatchesImages)]  # type: ignore[attr-defined]
        if isinstance(trainer.strategy, ShardedStrategy):
            trainer.strategy.share_buffers()
        trainer.validating = True  # data modules augment on the device in training alone
        try:
            for number, batch in enumerate(loader, start=1):
                batch = hooks.on_before_batch_transfer(batch, 0)
                images, labels = trainer.strategy.batch_to_device(batch)
                yield images, labels
                for callback in watching:
                    callback.on_images_read(trainer, number, len(loader))
            for _ in range(self._fewer(len(loader))):
                yield images[:0], labels[:0]
        finally:
            trainer.training = True

    def _fewer(self, batches: int) -> int:
        """How many batches others have more, where layers are gathered by all ranks together."""
        if not isinstance(self.trainer.strategy, ShardedStrategy):
            return 0
        most = torch.tensor(batches, device=self.trainer.strategy.root_device)
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
        return int(most) - batches


class InterpretableModule(L.LightningModule):
    """Trains an interpretable network by the terms of its loss.

    Logged: ``train/loss`` and its terms ``train/<term>``; of the validation images, where there
    are any, ``val/acc1``, and ``val/acc2`` and ``val/acc3`` where filters belong to classes, after
    every epoch. All random draws follow from ``seed``, epoch and rank, and a checkpoint within an
    epoch has the states of the generators and the sums of the epoch's means, of every rank: a run
    that resumes from a checkpoint ends like one never interrupted, if it goes on with as many ranks
    and its loader has a state, as those of the data modules here.

    Args:
        network: the network, also at ``.network``.
        lr: learning rate of the network.
        optimizer: a class of ``torch.optim``, or what else takes groups of parameters. Groups with
            a rate or a decay of their own are the network's matter (``parameter_groups``).
        schedule: "cosine" lets all rates fall over the run, epoch by epoch; "step" multiplies them
            by ``schedule_factor`` after each of ``schedule_steps``; "constant" keeps them.
        schedule_floor: share of each rate that the cosine ends at, in [0, 1].
        schedule_steps: epochs done before each fall of "step", one greater than the other; where
            optimisers take turns, each counts its own.
        schedule_factor: what a fall of "step" leaves of each rate, in (0, 1].
        warmup_epochs: over the first of them all rates rise linearly, epoch by epoch.
        accumulate_grad_batches: batches whose gradients a step takes the mean of, where optimisers
            take turns; where there is one it is the trainer's matter.
        compile: the forward pass of training is by ``torch.compile``, once the strategy has made
            of the network what it wants.
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
        schedule: Literal["cosine", "step", "constant"] = "cosine",
        schedule_floor: float = 0.0,
        schedule_steps: Sequence[int] = (60, 90, 120),
        schedule_factor: float = 0.1,
        warmup_epochs: int = 0,
        accumulate_grad_batches: int = 1,
        compile: bool = False,
        mutual_information_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=("network", "optimizer"), logger=False)
        self.network = network
        self.lr = checks.positive("lr", lr)
        self.make_optimizer = optimizer
        self.schedule = checks.one_of("schedule", schedule, ("cosine", "step", "constant"))
        if not 0 <= schedule_floor <= 1:
            raise ValueError(f"schedule_floor: got {schedule_floor}, want a number in [0, 1]")
        self.schedule_floor = schedule_floor
        check_steps(schedule_steps, schedule_factor)
        self.schedule_steps, self.schedule_factor = tuple(schedule_steps), schedule_factor
        self.warmup_epochs = checks.integer("warmup_epochs", warmup_epochs, 0)
        self.accumulate_grad_batches = checks.integer(
            "accumulate_grad_batches", accumulate_grad_batches, 1
        )
        self.compiled = compile
        self.mutual_information_weight = checks.non_negative(
            "mutual_information_weight", mutual_information_weight
        )
        self.mutual_information = MutualInformationLoss(network.num_classes)
        self.seed = seed
        # Of the epoch so far: sums of what is logged over its images, and how many these are.
        self._sums: dict[str, Tensor] = {}
        self._images = 0
        self._within: dict[str, Any] | None = None  # the epoch that a checkpoint is within
        self._earlier: dict[str, Tensor] | None = None  # sums that are not logged yet
        # Lightning steps one optimiser by itself; where several take turns, training_step does.
        self.automatic_optimization = len(network.optimizers(self.lr)) == 1
        self._sharing = sharing(
            name
            for name, figure in FIGURES.items()
            if figure.when == "epoch" and figure.needs(network, None) is None
        )
        self.figures = nn.ModuleDict(
            {first: FIGURES[first].metric(network, None, 1) for first in self._sharing}
        )

    def configure_model(self) -> None:
        """Deals the network out with ``--strategy fsdp``, and compiles it where that is asked."""
        if self._trainer is None:  # loaded from a checkpoint it has none yet
            return
        sharded = isinstance(self.trainer.strategy, ShardedStrategy)
        if sharded and not isinstance(self.network, FSDPModule):
            assert self.device_mesh is not None
            shard(self.network, self.device_mesh["data_parallel"])
        if self.compiled and self.network._compiled_call_impl is None:
            self.network.compile()

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, K]`` of the discrimination pathway."""
        logits: Tensor = self.network(images).logits
        return logits

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        *,
        network: InterpretableNetwork | None = None,
        **changed: Any,
    ) -> Self:
        """The module in a checkpoint, with the network and the optimiser it was trained with.

        Args:
            checkpoint_path: written by ``picnn-fast train``, or in one's own training loop.
            map_location: see ``torch.load``.
            network: to load the weights into; None builds that of ``picnn-fast train``.
            changed: arguments of the class to have otherwise than in the checkpoint.

        Raises:
            FileNotFoundError: no such file.
            RunFolderError: no network is given, and the file is not of ``picnn-fast train``.
        """
        if network is None:
            network, options, _ = load_checkpoint(checkpoint_path)
            changed = {"optimizer": options.optimizer_class(), **changed}
        return super().load_from_checkpoint(
            checkpoint_path, map_location, weights_only=True, network=network, **changed
        )

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits of a batch of images, or of images and labels."""
        images = batch[0] if isinstance(batch, list | tuple) else batch
        logits: Tensor = self(images)
        return logits

    def configure_optimizers(self) -> Any:
        groups = self.network.optimizers(self.lr)
        self._names = list(groups)
        configured = []
        for name in self._names:
            optimizer = self.make_optimizer(groups[name])
            interval, done = self._course(name)
            rates = LambdaLR(optimizer, partial(self._share, done))
            schedule = {"scheduler": rates, "interval": interval}
            configured.append({"optimizer": optimizer, "lr_scheduler": schedule})
        return configured[0] if len(configured) == 1 else configured

    def _course(self, name: str) -> tuple[str, Callable[[int], float]]:
        """By what the rates of an optimiser change, "epoch" or "step", and how far it is then."""
        epochs, steps = self.trainer.max_epochs or 0, self.trainer.max_steps
        timer = next((c for c in self.trainer.callbacks if isinstance(c, Timer)), None)  # type: ignore[attr-defined]
        # By epochs where possible: counting steps would start the workers before a resumed epoch is
        # known.
        if epochs >= 1:
            own = sum(self.network.optimizer_of(e + 1, epochs) == name for e in range(epochs))
            falling = max(own - self.warmup_epochs, 1)
            return "epoch", lambda epoch: (epoch - self.warmup_epochs) / falling
        if self.schedule != "cosine" and self.warmup_epochs == 0:
            return "epoch", lambda epoch: 0.0
        if self.warmup_epochs > 0:
            raise ValueError(
                f"warmup_epochs: got {self.warmup_epochs} without max_epochs, want 0, or max_epochs"
            )
        if len(self._names) > 1:
            raise ValueError(
                f"schedule: got {self.schedule!r} without max_epochs and with epochs that take"
                " turns, want max_epochs, or 'constant'"
            )
        if steps >= 1:
            return "step", lambda step: min(step / steps, 1.0)
        if timer is not None:

            def elapsed(step: int) -> float:
                whole = timer.time_elapsed() + (timer.time_remaining() or 0.0)
                return min(timer.time_elapsed() / whole, 1.0) if whole > 0 else 0.0

            return "step", elapsed
        raise ValueError(
            f"schedule: got {self.schedule!r} in a run without an end, want max_epochs, max_steps"
            " or max_time; or 'constant'"
        )

    def _share(self, done: Callable[[int], float], count: int) -> float:
        """Of each rate, after so many epochs or steps."""
        if count < self.warmup_epochs:
            return (count + 1) / (self.warmup_epochs + 1)
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            falls = sum(count >= step for step in self.schedule_steps)
            return self.schedule_factor**falls
        cosine = (1 + math.cos(math.pi * done(count))) / 2
        return self.schedule_floor + (1 - self.schedule_floor) * cosine

    def _turn(self) -> int:
        """The place of the optimiser whose epoch it is, where several take turns."""
        epochs = self.trainer.max_epochs or 0
        name = self.network.optimizer_of(self.current_epoch + 1, epochs if epochs > 0 else None)
        return self._names.index(name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        if progress.ready == progress.processed:  # between epochs
            return
        mine = {
            "generators": _generators(self.device),
            "sums": {name: value.cpu() for name, value in self._sums.items()},
            "images": self._images,
        }
        ranks = [mine]
        if self.trainer.world_size > 1:
            ranks = [{} for _ in range(self.trainer.world_size)]
            distributed.all_gather_object(ranks, mine)
        checkpoint[_WITHIN] = {"epoch": self.current_epoch, "ranks": ranks}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fitting = self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING
        self._within = checkpoint.get(_WITHIN) if fitting else None
        if self._within is None:
            return
        before, now = len(self._within["ranks"]), self.trainer.world_size
        if before != now:
            # Each rank now takes another share of the epoch, of which as much is done.
            steps = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
            done = steps["ready"] * before // now
            steps.update(ready=done, started=done, processed=done, completed=done - 1)

    def _go_on_within(self, within: dict[str, Any]) -> None:
        """Be as in the midst of the epoch that a checkpoint was written in."""
        ranks, rank = within["ranks"], self.global_rank
        if len(ranks) == self.trainer.world_size:
            _set_generators(ranks[rank]["generators"], self.device)
            shares = [ranks[rank]]
        else:
            batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
            torch.manual_seed(derive_seed(self.seed, _TRAIN, self.current_epoch, rank, batches))
            shares = ranks if rank == 0 else []
        self._images = sum(share["images"] for share in shares)
        for share in shares:
            for name, value in share["sums"].items():
                self._sums[name] = self._sums.get(name, 0.0) + value.to(self.device)
        self._earlier = dict(self._sums)

    def on_train_start(self) -> None:
        # The first epoch after resuming has no on_train_epoch_start.
        self._begun: int | None = None
        within, self._within = self._within, None
        if within is not None and within["epoch"] == self.current_epoch:
            self._begun = self.current_epoch
            self._sums, self._images = {}, 0
            self._go_on_within(within)
        else:
            self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        self._sums, self._images, self._earlier = {}, 0, None
        if self._begun != self.current_epoch:
            self._begun = self.current_epoch
            batches = self.trainer.num_training_batches
            epochs = self.trainer.max_epochs or 0
            self.network.begin_epoch(
                self.current_epoch + 1,
                int(batches) if 0 < batches < math.inf else None,
                epochs if epochs > 0 else None,
                images=_TrainingImages(self.trainer),
            )
        torch.manual_seed(derive_seed(self.seed, _TRAIN, self.current_epoch, self.global_rank))

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
        self._log_means({"loss": loss.detach(), **terms}, len(labels))
        if not self.automatic_optimization:
            self._step_in_turn(loss, batch_idx)
        return loss

    def _step_in_turn(self, loss: Tensor, batch_idx: int) -> None:
        """Add a batch's gradients up, and step the optimiser whose epoch it is, once due."""
        optimizers: Any = self.optimizers()
        batches = self.accumulate_grad_batches
        if batch_idx % batches == 0:
            # Not the module's: under FSDP2 its parameters are others between the two passes.
            for one in optimizers:
                one.zero_grad()
        self.manual_backward(loss / batches)
        if (batch_idx + 1) % batches == 0 or self.trainer.is_last_batch:
            optimizers[self._turn()].step()
            self.network.after_step()

    def _log_means(self, terms: Mapping[str, Tensor], images: int) -> None:
        """Means over the epoch, and over ranks; their sums so far, for a checkpoint."""
        if self._earlier is not None:
            # What Lightning counts, which it does not save: a sum, and how many images it is of.
            self._log(self._earlier, 1)
            self._log(
                {name: torch.zeros_like(x) for name, x in self._earlier.items()}, self._images - 1
            )
            self._earlier = None
        self._log(terms, images)
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + term.detach() * images
        self._images += images

    def _log(self, terms: Mapping[str, Tensor], images: int) -> None:
        for name, term in terms.items():
            self.log(
                f"train/{name}",
                term,
                prog_bar=name == "loss",
                on_step=False,
                on_epoch=True,
                sync_dist=True,
                batch_size=images,
            )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.is_last_batch:  # the weights are saved next
            self.check_weights(batch[0])

    def check_weights(self, images: Tensor) -> None:
        """No loss was computed yet of what a step has made of the weights.

        Args:
            images: ``[B, C, H, W]`` that the network was trained on.

        Raises:
            DivergenceError: logits of them are no finite numbers.
        """
        images = images.to(next(self.network.parameters()).dtype)
        with torch.no_grad(), evaluating(self.network), whole(self.network):
            maps, bypass = self.network.encode(images)
            logits = self.network.head_logits(maps, bypass=bypass)
        self._check_finite(logits.abs().amax(), "the largest logit after the last step")

    def on_train_epoch_end(self) -> None:
        if not self.automatic_optimization:
            self.lr_schedulers()[self._turn()].step()  # type: ignore[index]
        own = {f"method/{name}": value for name, value in self.network.logged().items()}
        self.log_dict(own, sync_dist=True)
        loss = self.trainer.callback_metrics.get("train/loss")
        if loss is not None:  # a bare trainer logs nothing
            self._check_finite(loss)

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
        # Ranks draw apart.
        number = batch_idx * self.trainer.world_size + self.trainer.global_rank
        seed = derive_seed(self.seed, _EVALUATE, number)
        seen = Observation(self.network, images, labels, seed=seed)
        for name, metric in self.figures.items():
            FIGURES[name].update(metric, seen)

    def on_validation_epoch_end(self) -> None:
        for first, metric in self.figures.items():
            computed = metric.compute()  # type: ignore[operator]
            for name in self._sharing[first]:
                value = FIGURES[name].of(computed)
                value = value if isinstance(value, Tensor) else value.mean
                self.log(f"val/{name}", value, prog_bar=True, sync_dist=True)
