"""Train a network of timm's with PICNN, in a loop of your own, and measure what became of it.

    python examples/own_training_loop_timm.py
    python examples/own_training_loop_timm.py --root FOLDER --network resnet18 --epochs 30

FOLDER holds train/<class>/<image> and test/<class>/<image>, or class folders alone; --pretrained
starts from timm's weights. Without --root scikit-learn's handwritten digits are learned by a
ResNet-18 that is cut behind its second stage: the fourth leaves one position of 32 pixels.
Install: picnn_fast[train,timm].
"""

import argparse

import timm
import torch
from rich.progress import track

import picnn_fast
from picnn_fast.data import DATA
from picnn_fast.evaluation import FIGURES, evaluate, format_figure


def main(words: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--root", help="folder of images; handwritten digits without it")
    parser.add_argument("--network", help="a name of timm's, cut at its last maps; resnet18")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--image_size", type=int, default=64, help="pixels, of --root")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    of_folder = {"root": args.root, "image_size": args.image_size} if args.root else {}
    data = DATA["folder" if args.root else "digits"](batch_size=args.batch_size, **of_folder)

    # timm's own layers are used in place, with a new target layer and a new classifier behind them.
    name, layer = args.network or "resnet18", None if args.root or args.network else "layer2"
    backbone = timm.create_model(name, pretrained=args.pretrained, in_chans=data.in_channels)
    model = picnn_fast.make_interpretable(
        backbone, "picnn", num_classes=data.num_classes, layer=layer
    )
    model.to(device)
    optimizer = torch.optim.Adam(model.parameter_groups(lr=args.lr))

    loader = data.train_dataloader()
    for epoch in range(1, args.epochs + 1):
        loader.sampler.set_epoch(epoch)  # another order each epoch
        model.train().begin_epoch(epoch, len(loader), args.epochs)
        total = 0.0
        for batch in track(loader, f"epoch {epoch}/{args.epochs}", transient=True):
            batch = [part.to(device) for part in batch]
            images, labels = data.on_after_batch_transfer(batch, 0)  # normalised, where due
            loss = model.loss(model(images, labels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.after_step()
            total += loss.item() * len(labels)
        print(f"epoch {epoch}/{args.epochs}  loss {total / len(data.train_set):.3f}")

    # The test split is looked at once, at the end.
    names = ["acc1", "acc2", "acc3", "mis"]
    figures = evaluate(model, data, figures=names, device=device, progress=True)
    for name in names:
        print(f"{FIGURES[name].heading:>5} {format_figure(figures, name):>15}", end="  ")
        print(FIGURES[name].reading)
    counts = model.ownership().argmax(0).bincount(minlength=data.num_classes).tolist()
    for name, count in zip(data.class_names, counts, strict=True):
        print(f"{count:5} of {model.num_filters} filters are drawn most often for {name}")


if __name__ == "__main__":
    main()
