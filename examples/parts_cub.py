"""Measure whether the filters of a network keep to parts of birds, on CUB-200-2011.

    python examples/parts_cub.py CUB_200_2011 --network vgg16 --weights FILE.pth
    python examples/parts_cub.py CUB_200_2011 --run runs/train/last.ckpt

CUB_200_2011 is the unpacked archive. FILE is a state dict of a torchvision network, for whatever
classes; --run takes what picnn-fast train has saved. Install: picnn_fast[train].
"""

import argparse
import warnings

import torch

from picnn_fast import make_interpretable
from picnn_fast.data import DATA
from picnn_fast.evaluation import FIGURES, evaluate, format_figure
from picnn_fast.training.checkpoint import load_checkpoint

NAMES = [
    "location_instability",
    "location_instability_middle",
    "location_instability_random",
    "part_interpretability",
]


def main(words: list[str] | None = None) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("root", help="the folder CUB_200_2011")
    parser.add_argument("--run", help="checkpoint of picnn-fast train")
    parser.add_argument("--network", default="vgg16", help="a name of torchvision's")
    parser.add_argument("--weights", help="file of a state dict, or a name: IMAGENET1K_V1")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    # The head, back and tail of the paper, as its authors' code has them.
    parts = ["forehead", "back", "tail"]
    parser.add_argument("--landmarks", nargs="+", default=parts, help="of parts/parts.txt")
    args = parser.parse_args(words)

    data = DATA["cub"](
        root=args.root,
        image_size=args.image_size,
        landmark_names=args.landmarks,
        batch_size=args.batch_size,
    )
    if args.run:
        network = load_checkpoint(args.run)[0]
    else:
        if args.weights is None:
            warnings.warn("no --weights: what follows is of random filters", stacklevel=2)
            torch.manual_seed(0)
        # "std" changes nothing below the classifier, of which nothing is measured.
        options = {"insert_conv": False, "weights": args.weights}
        network = make_interpretable(args.network, "std", num_classes=data.num_classes, **options)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures = evaluate(network, data, figures=NAMES, device=device, progress=True)
    print(f"{network.num_filters} filters on {len(data.test_set)} birds of the test split")
    for name in NAMES:
        print(f"\n{FIGURES[name].heading:>20} {format_figure(figures, name)}")
        value = figures[name]
        print(f"{'':>20} {value if isinstance(value, str) else FIGURES[name].reading}")


if __name__ == "__main__":
    main()
