"""What logs figures through Lightning: a function and two callbacks, for modules of your own."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.evaluation.figures import FIGURES
from picnn_fast.evaluation.loop import evaluate
from picnn_fast.evaluation.observation import pool
from picnn_fast.evaluation.values import Figures
from picnn_fast.metrics import MutualInformationScore
from picnn_fast.models.base import InterpretableNetwork

with extra("train"):
    import lightning as L
    from lightning.fabric.loggers.logger import Logger
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.trainer.states import TrainerFn


def log_figures(
    loggers: Logger | Iterable[Logger],
    figures: Mapping[str, Any],
    step: int | None = None,
    *,
    prefix: str = "test",
) -> dict[str, float]:
    """Log figures to TensorBoard, Weights & Biases, MLflow, CSV, or what else Lightning logs to.

    A figure that is n/a is left out. Keys are those of ``figures`` behind the prefix, as
    ``test/acc1`` and ``test/acc1_standard_error``; the ends of an interval have keys of their own,
    ``test/acc1_interval_low`` and ``test/acc1_interval_high``.

    Args:
        loggers: one of Lightning's, or several, such as ``trainer.loggers``.
        figures: of ``evaluate``: numbers, pairs of numbers, and text in place of what is n/a.
        step: of training; None leaves it to the logger.
        prefix: before each name, with a slash; "" for none.

    Returns:
        What was logged, by its key.

    Raises:
        TypeError: a logger that has no ``log_metrics``.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> from picnn_fast.evaluation import log_figures
        >>> figures = {"acc1": 0.9, "acc1_standard_error": 0.01, "density": "n/a: it has no gate"}
        >>> log_figures(CSVLogger("runs"), figures, step=100)
        {'test/acc1': 0.9, 'test/acc1_standard_error': 0.01}
    """
    every = list(loggers) if isinstance(loggers, Iterable) else [loggers]
    for logger in every:
        if not callable(getattr(logger, "log_metrics", None)):
            raise TypeError(f"loggers: got {type(logger).__name__}, want loggers of Lightning")
    values: dict[str, float] = {}
    for name, value in figures.items():
        # Not "acc1/low": MLflow's files cannot hold a key and others below it.
        key = f"{prefix}/{name}" if prefix else name
        if isinstance(value, int | float):
            values[key] = float(value)
        elif not isinstance(value, str):
            low, high = value
            values |= {f"{key}_low": float(low), f"{key}_high": float(high)}
    if values:
        for logger in every:
            logger.log_metrics(values, step)
    return values


class FiguresCallback(Callback):
    """Measures the network of any LightningModule, and logs its figures to the trainer's loggers.

    They are those of ``evaluate``, on the test split of ``data``: once, when training ends, or
    during it too; a network that is chosen by them has no test split left. What is measured is a
    copy in float32, in evaluation mode, so that training goes on as if nothing had been. Several
    ranks measure the split together, the network as the first has it, and the first logs;
    parameters have to be whole on each, as with DDP.

    Args:
        data: a data module of ours, set up; None: that of ``trainer.fit``.
        network: the attribute of the LightningModule that is the ``InterpretableNetwork``, or a
            function that takes the module and gives it.
        every_n_epochs: of training, after each of which figures are logged too; None: only once,
            at the end.
        prefix: of the keys, see ``log_figures``.
        **options: of ``evaluate``, such as ``figures``, ``seed`` and ``draws``.

    Attributes:
        figures: those measured last, n/a ones with their reasons; None before.

    Raises:
        TypeError: an argument of the wrong type, or an option that ``evaluate`` does not have; when
            training starts, a network or data that are not ours.
        ValueError: an argument out of range; when training starts, no such attribute.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from picnn_fast.data import DigitsDataModule
        >>> from picnn_fast.evaluation import FiguresCallback
        >>> from picnn_fast.models import make_interpretable
        >>> class Trained(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = make_interpretable("small-resnet", "picnn", num_classes=10)
        ...     def training_step(self, batch, batch_idx):
        ...         images, labels = batch
        ...         return self.network.loss(self.network(images, labels), labels)
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.network.parameter_groups(lr=1e-3))
        >>> callback = FiguresCallback(DigitsDataModule(), draws=4)
        >>> trainer = L.Trainer(max_epochs=5, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.fit(Trained(), DigitsDataModule())  # doctest: +SKIP
    """

    def __init__(
        self,
        data: SeededDataModule | None = None,
        *,
        network: str | Callable[[L.LightningModule], InterpretableNetwork] = "network",
        every_n_epochs: int | None = None,
        prefix: str = "test",
        **options: Any,
    ) -> None:
        self.data = None if data is None else _checked_data(data)
        self.network = network
        if every_n_epochs is not None:
            checks.integer("every_n_epochs", every_n_epochs, 1)
        self.every_n_epochs = every_n_epochs
        self.prefix = prefix
        # Known before training, not after it.
        inspect.signature(evaluate).bind(None, data, device=None, **options)
        for name in options.get("figures") or ():
            checks.one_of("figures", name, tuple(FIGURES))
        self.options = options
        self.figures: Figures | None = None
        self._step: int | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._network(pl_module)
        self._data(trainer)
        self._step = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._step != trainer.global_step:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = copy.deepcopy(self._network(pl_module)).float()
        stage = trainer.state.stage
        trainer.validating = True  # data modules augment on the device in training alone
        try:
            self.figures = evaluate(
                network, self._data(trainer), device=pl_module.device, **self.options
            )
        finally:
            trainer.state.stage = stage
        self._step = trainer.global_step
        log_figures(trainer.loggers, self.figures, self._step, prefix=self.prefix)

    def _network(self, pl_module: L.LightningModule) -> InterpretableNetwork:
        if isinstance(self.network, str):
            if not hasattr(pl_module, self.network):
                names = [name for name, _ in pl_module.named_children()]
                raise ValueError(
                    f"network: got {self.network!r},{checks.did_you_mean(self.network, names)} want"
                    f" an attribute of {type(pl_module).__name__}, or a function of it"
                )
            network = getattr(pl_module, self.network)
        else:
            network = self.network(pl_module)
        if not isinstance(network, InterpretableNetwork):
            raise TypeError(
                f"network: got {type(network).__name__}, want an InterpretableNetwork, as"
                " make_interpretable gives"
            )
        return network

    def _data(self, trainer: L.Trainer) -> SeededDataModule:
        if self.data is not None:
            return self.data
        return _checked_data(trainer.datamodule)  # type: ignore[attr-defined]


def _checked_data(data: object) -> SeededDataModule:
    if not isinstance(data, SeededDataModule):
        raise TypeError(
            f"data: got {type(data).__name__}, want a data module of picnn_fast.data, for its test"
            " split"
        )
    return data


class MutualInformationCallback(Callback):
    """Logs the mutual information score of a layer of any LightningModule, as it trains.

    While ``validation_step`` runs, the maps that the layer yields are averaged over their
    positions; over all validation images they make the score, see ``MutualInformationScore``. The
    module is left as it is. Over ranks the score is that of all their images; where ranks do not
    divide them, Lightning repeats some.

    Args:
        layer: its name, as ``named_modules()`` of the LightningModule has it: ``"model.layer4"``.
            Of a layer that runs several times a step the last run counts.
        num_classes: K.
        every_n_epochs: of training, after which to measure.
        labels: of the images of a batch: its index or key there, or a function of the batch.
        channel_dim: the filter axis of what the layer yields: 1 of maps ``[B, N, h, w]``, -1 of
            tokens ``[B, T, N]``.
        dataloader_idx: which of several validation loaders.
        name: logged as; None: ``"val/mis/<layer>"``.
        **options: of ``MutualInformationScore``; ``estimator="histogram"`` keeps no activations.

    Attributes:
        matrix: m ``[K, N]`` measured last, nats, float64 on the CPU; None before.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; when training or
            validation starts, no such layer; in validation, a layer that yields no maps or is not
            run, labels that the batch does not hold.

    Source:
        Liang et al., "Training Interpretable CNNs by Differentiating Class-Specific Filters",
        ECCV 2020, section 4.1.

    Example:
        >>> import lightning as L
        >>> from picnn_fast.evaluation import MutualInformationCallback
        >>> callback = MutualInformationCallback("model.features.28", num_classes=10)
        >>> callback.name
        'val/mis/model.features.28'
        >>> trainer = L.Trainer(max_epochs=5, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        layer: str,
        num_classes: int,
        *,
        every_n_epochs: int = 1,
        labels: int | str | Callable[[Any], Tensor] = 1,
        channel_dim: int = 1,
        dataloader_idx: int = 0,
        name: str | None = None,
        **options: Any,
    ) -> None:
        self.layer = layer
        self.every_n_epochs = checks.integer("every_n_epochs", every_n_epochs, 1)
        self.labels = labels
        self.channel_dim = channel_dim
        self.dataloader_idx = checks.integer("dataloader_idx", dataloader_idx, 0)
        self.name = f"val/mis/{layer}" if name is None else name
        MutualInformationScore(num_classes, **options)  # a wrong option is known before training
        self.num_classes, self.options = num_classes, options
        self.matrix: Tensor | None = None
        self._metric: MutualInformationScore | None = None
        self._handle: RemovableHandle | None = None
        self._pooled: Tensor | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._layer(pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (
            fitting and (trainer.current_epoch + 1) % self.every_n_epochs != 0
        ):
            return
        metric = MutualInformationScore(self.num_classes, **self.options)
        self._metric = metric.to(pl_module.device)
        self._handle = self._layer(pl_module).register_forward_hook(self._keep)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        pooled, self._pooled = self._pooled, None
        if self._metric is None or dataloader_idx != self.dataloader_idx:
            return
        if pooled is None:
            raise ValueError(f"layer: got {self.layer!r}, want one that validation_step runs")
        self._metric.update(pooled, self._labels(batch))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metric = self._metric
        self._forget()
        if metric is not None:
            score = metric.compute()
            self.matrix = metric.matrix()
            pl_module.log(self.name, score, sync_dist=True)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._forget()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._forget()

    def _forget(self) -> None:
        """The layer is as it was, and no activation is kept."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._metric = self._pooled = None

    def _layer(self, pl_module: L.LightningModule) -> nn.Module:
        layers: dict[str, nn.Module] = dict(pl_module.named_modules())
        del layers[""]  # the module itself
        if self.layer not in layers:
            raise ValueError(
                f"layer: got {self.layer!r},{checks.did_you_mean(self.layer, layers)} want the name"
                f" of a layer of {type(pl_module).__name__}, as named_modules() has it"
            )
        return layers[self.layer]

    def _keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Told by the layer what it yields."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer: got {self.layer!r}, which yields a {type(output).__name__}, want one that"
                " yields a tensor of maps, such as a layer within it"
            )
        if output.ndim < 3 or not output.is_floating_point():
            raise ValueError(
                f"layer: got {self.layer!r}, which yields {output.dtype} {list(output.shape)}, want"
                " maps [B, N, h, w], or tokens [B, T, N] with channel_dim=-1"
            )
        self._pooled = pool(output.detach(), self.channel_dim)

    def _labels(self, batch: Any) -> Tensor:
        if callable(self.labels):
            return self.labels(batch)
        try:
            labels: Tensor = batch[self.labels]
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"labels: got {self.labels!r}, which a {type(batch).__name__} of a batch does not"
                " hold, want its index or key there, or a function of the batch"
            ) from error
        return labels
