"""Measure how much the filters of a trained torchvision network tell of your classes.

    python examples/mis_of_torchvision.py FOLDER --network resnet18 --weights FILE.pth

FOLDER holds <class>/<image>: images that the network was not trained on. FILE is a state dict of
that network, for whatever classes. The network is not changed. Install: picnn_fast[train].
"""

import argparse
import math
import warnings

import torch
from rich.progress import track
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from picnn_fast.backbones import cut
from picnn_fast.metrics import MutualInformationScore

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def main(words: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("root", help="folder of class folders")
    parser.add_argument("--network", default="resnet18", help="a name of torchvision's")
    parser.add_argument("--layer", help="such as layer4.1, features.28; the last one without it")
    parser.add_argument("--weights", help="file of a state dict, or a name: IMAGENET1K_V1")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.weights is None:
        warnings.warn("no --weights: what follows is of random filters", stacklevel=2)
        torch.manual_seed(0)

    show = [v2.Resize(args.image_size), v2.CenterCrop(args.image_size), v2.ToImage()]
    show += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    images = ImageFolder(args.root, v2.Compose(show))
    loader = DataLoader(images, args.batch_size)
    parts = cut(args.network, args.layer, weights=args.weights)
    features = parts.features.to(device).eval()

    score, chance = (MutualInformationScore(len(images.classes)) for _ in range(2))
    shuffled = torch.tensor(images.targets)[torch.randperm(len(images))].split(args.batch_size)
    for (batch, labels), others in zip(track(loader, "images"), shuffled, strict=True):
        with torch.no_grad():
            pooled = features(batch.to(device)).mean((2, 3))
        score.update(pooled, labels)
        chance.update(pooled, others)

    shares = torch.bincount(torch.tensor(images.targets)) / len(images)
    most = max(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in shares.tolist() if 0 < p < 1)
    print(f"{args.network}, layer {parts.layer}: {score.matrix().shape[1]} filters")
    print(f"{len(images)} images of {len(images.classes)} classes\n")
    print(f"MIS {score.compute():.3f} nats: what a filter tells of its best class, mean of filters")
    print(f"    {chance.compute():.3f} with labels shuffled: so much chance alone gives")
    print(f"    {most:.3f} is all there is to tell of one class; of few images estimates stray\n")
    print("The filters that tell most of each class, and how much:")
    told, filters = score.matrix().topk(min(3, score.matrix().shape[1]))
    for name, values, numbers in zip(images.classes, told, filters, strict=True):
        pairs = zip(numbers.tolist(), values.tolist(), strict=True)
        print(f"{name:>20}  " + "  ".join(f"{number} ({value:.3f})" for number, value in pairs))


if __name__ == "__main__":
    main()
