"""What a training tells its user: at the start, while it runs, and of the hardware it could use."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from picnn_fast._extras import extra
from picnn_fast._terminal import counted, printable
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.models.base import InterpretableNetwork

with extra("train"):
    import lightning as L
    from lightning.pytorch.callbacks import Callback
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

SECONDS = 30.0  # between two lines of a log file
BAR_SECONDS = 0.5  # between two looks at the loss, each of which waits for a GPU


@dataclasses.dataclass(frozen=True)
class Work:
    """What one image costs in training.

    Attributes:
        image_shape: channels, height and width.
        parameters: of the network.
        share: of the multiplications of a forward pass that are not the backbone's: the target
            layer, the head, and what the method adds.
    """

    image_shape: tuple[int, int, int]
    parameters: int
    share: float


def work(network: InterpretableNetwork, image: Tensor, *, inserted: bool) -> Work:
    """What training a network costs, by a forward pass of one image.

    Args:
        network: in evaluation mode.
        image: ``[1, C, H, W]``.
        inserted: whether a target layer was put after the backbone.
    """
    label = torch.zeros(1, dtype=torch.int64, device=image.device)

    def multiplications(run: Callable[[], object]) -> int:
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            run()
        return counter.get_total_flops()

    features = network.features
    backbone = features[0] if inserted and isinstance(features, nn.Sequential) else features
    whole = multiplications(lambda: network(image, label))
    share = 1 - multiplications(lambda: backbone(image)) / whole if whole else 0.0
    parameters = sum(parameter.numel() for parameter in network.parameters())
    channels, height, width = image.shape[1:]
    return Work((channels, height, width), parameters, share)


def native_bfloat16(device: torch.device) -> bool:
    """Whether a device has units for bfloat16, as far as torch tells."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Versions of torch before it had this tell nothing.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(
        capabilities.get(name) for name in ("amx_bf16", "avx512_bf16")
    )


class Introduction(Callback):
    """Says what a run is about to do, a line a subject, once it is known where it begins.

    Args:
        data, network, cost: of the run.
        data_name, backbone, output: as the user named them.
    """

    def __init__(
        self,
        data: SeededDataModule,
        network: InterpretableNetwork,
        cost: Work,
        *,
        data_name: str,
        backbone: str,
        output: str,
    ) -> None:
        train, test = (len(images) for images in (data.train_set, data.test_set))  # type: ignore[arg-type]
        channels, height, width = cost.image_shape
        self.large = min(height, width) >= 32  # smaller convolutions gain nothing
        self.lines = {
            "images": f"{data_name}: {train} to train on, {test} to test on,"
            f" {channels} x {height} x {width}, {counted(data.num_classes, 'class')}",
            "validation": data.validation_source,
            **({} if data.remark is None else {"remark": data.remark}),
            "network": f"{type(network).__name__} over {backbone}:"
            f" {counted(network.num_filters, 'filter')},"
            f" {cost.parameters:,} parameters; target layer, head and method take"
            f" {cost.share:.0%} of the multiplications",
            "output": output,
        }

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        device = trainer.strategy.root_device
        where = str(device) if trainer.world_size == 1 else f"{trainer.world_size} x {device.type}"
        lines = {"device": f"{where}, precision {trainer.precision}", **self.lines}
        first, last, step = trainer.current_epoch + 1, trainer.max_epochs or 0, _begun(trainer)
        goes_on = first > 1 or step > 0
        lines["training"] = (
            f"goes on with epoch {first} of {last}" if goes_on else counted(last, "epoch")
        )
        if step:
            lines["training"] += f", after {step} of its {_batches(trainer)} steps"
        if trainer.precision == "32-true" and self.large and native_bfloat16(device):
            lines["hint"] = (
                "this device has units for bfloat16, with which --precision bf16-mixed makes steps"
                " of large convolutions faster"
            )
        text = "\n".join(f"{name:<12}{line}" for name, line in lines.items())
        print(printable(text), flush=True)


class _Pace:
    """Steps done and left of a run, and how long these will take."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.began = clock()
        self.done = 0

    def step(self) -> None:
        self.done += 1

    def left(self, steps: int) -> str:
        if self.done == 0:
            return "?"
        seconds = round((self.clock() - self.began) / self.done * steps)
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


def _batches(trainer: L.Trainer) -> int:
    """Of an epoch."""
    return max(int(trainer.num_training_batches), 1)


def _begun(trainer: L.Trainer) -> int:
    """Batches of the epoch that training begins with that were trained on before."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    within = progress.started > progress.processed
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready if within else 0


def _epoch(trainer: L.Trainer) -> str:
    width = len(str(trainer.max_epochs))
    return f"epoch {trainer.current_epoch + 1:{width}}/{trainer.max_epochs}"


def _reading(trainer: L.Trainer, batch: int, batches: int) -> str:
    return f"{_epoch(trainer)}  reads the training images first: {batch}/{batches} batches"


def _figures(trainer: L.Trainer) -> list[str]:
    """The loss of an epoch and the figures of its validation images, where there are any.

    At an epoch's end all processes must ask: the first who does starts means over them all.
    """
    return [
        f"{name.rpartition('/')[2]} {value.item():.3f}"
        for name, value in sorted(trainer.callback_metrics.items())
        if name == "train/loss" or name.startswith(("val/", "method/"))
    ]


class WatchesImages(Callback):
    """Is told while a method reads the training images between epochs."""

    def on_images_read(self, trainer: L.Trainer, batch: int, batches: int) -> None:
        """After each of so many batches, counted from 1."""


class ProgressLines(WatchesImages):
    """A line an epoch, and one every half minute between, where there is no terminal.

    Args:
        clock: in seconds.
        say: takes the lines.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, say: Callable[[str], None] | None = None
    ) -> None:
        self.clock = clock
        self.say = say or (lambda line: print(line, flush=True))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pace = _Pace(self.clock)
        self.said = self.clock()

    def on_images_read(self, trainer: L.Trainer, batch: int, batches: int) -> None:
        if trainer.is_global_zero and self.clock() - self.said >= SECONDS:
            self.said = self.clock()
            self.say(_reading(trainer, batch, batches))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.pace.step()
        step, batches = batch_idx + 1, _batches(trainer)
        if not trainer.is_global_zero or step == batches or self.clock() - self.said < SECONDS:
            return
        self.said = self.clock()
        left = self.pace.left(_steps_left(trainer, step))
        self.say(
            f"{_epoch(trainer)}  step {step}/{batches}  loss {_loss(outputs):.3f}  {left} left"
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures = _figures(trainer)
        if trainer.is_global_zero:
            self.said = self.clock()
            left = self.pace.left(_steps_left(trainer, _batches(trainer)))
            self.say("  ".join([_epoch(trainer), *figures, f"{left} left"]))


class ProgressBar(WatchesImages):
    """A bar over the steps of the run, with loss, figures and the time that is left.

    Args:
        console: to draw on; None: the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.looked = -BAR_SECONDS
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("done,"),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[figures]}"),
            console=self.console,
        )
        self.task = self.bar.add_task(
            _epoch(trainer),
            total=_batches(trainer) * (trainer.max_epochs or 1),
            completed=_batches(trainer) * trainer.current_epoch + _begun(trainer),
            figures="",
        )
        self.bar.start()

    def on_images_read(self, trainer: L.Trainer, batch: int, batches: int) -> None:
        if trainer.is_global_zero and time.monotonic() - self.looked >= BAR_SECONDS:
            self.looked = time.monotonic()
            self.bar.update(self.task, description=_reading(trainer, batch, batches), refresh=True)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not trainer.is_global_zero:
            return
        self.bar.advance(self.task)
        if time.monotonic() - self.looked >= BAR_SECONDS:
            self.looked = time.monotonic()
            figures = [text for text in _figures(trainer) if not text.startswith("loss")]
            self._show(trainer, [f"loss {_loss(outputs):.3f}", *figures])

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures = _figures(trainer)
        if trainer.is_global_zero:
            self._show(trainer, figures)

    def _show(self, trainer: L.Trainer, figures: list[str]) -> None:
        self.bar.update(self.task, description=_epoch(trainer), figures=escape("  ".join(figures)))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()


def _steps_left(trainer: L.Trainer, step: int) -> int:
    epochs = (trainer.max_epochs or 1) - trainer.current_epoch
    return epochs * _batches(trainer) - step


def _loss(outputs: Any) -> float:
    loss = outputs["loss"] if isinstance(outputs, dict) else outputs
    return float(loss)
