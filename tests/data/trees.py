"""Trees of annotated photographs in the layouts that the readers take."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

# Of the photographs of VOC Part, pixels.
WIDTH, HEIGHT = 100, 80
PARTS = ["back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg"]
PARTS += ["left wing", "nape", "right eye", "right leg", "right wing", "tail", "throat"]
FOX, GOLDFISH = "n02118333", "n01443537"
SIDES = ("xmin", "ymin", "xmax", "ymax")


def block(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def structs(rows, fields):
    """A MATLAB structure array ``1 x n``."""
    array = np.zeros((1, len(rows)), [(field, object) for field in fields])
    for place, row in enumerate(rows):
        array[0, place] = tuple(row)
    return array


def annotate(root, name, objects):
    """``Annotations_Part/<name>.mat`` as published, and a photograph that shows the masks."""
    rows = []
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for category, index, mask, parts in objects:
        named = structs(parts.items(), ["part_name", "mask"]) if parts else np.zeros((0, 0))
        rows.append((category, index, mask, named))
        pixels[mask > 0] = 255
    fields = ["class", "class_ind", "mask", "parts"]
    anno = structs([(name, structs(rows, fields))], ["imname", "objects"])
    folder = root / "Annotations_Part"
    folder.mkdir(parents=True, exist_ok=True)
    savemat(folder / f"{name}.mat", {"anno": anno}, do_compression=True)
    photographs = root / "VOCdevkit" / "VOC2010" / "JPEGImages"
    photographs.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(photographs / f"{name}.jpg", quality=95)


def voc_list(root, category, split, **shown):
    folder = root / "VOCdevkit" / "VOC2010" / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{name[1:]} {value:2}\n" for name, value in shown.items()]
    (folder / f"{category}_{split}.txt").write_text("".join(lines))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))


def save_v7(path, name, rows):
    """A structure array ``1 x n`` of the rows, as ``save -v7`` writes it."""
    array = np.zeros((1, len(rows)), [(field, object) for field in rows[0]])
    for place, row in enumerate(rows):
        array[0, place] = tuple(row.values())
    savemat(path, {name: array})


def save_v73(path, name, rows):
    """The same, as MATLAB 7.3 does: HDF5, axes swapped, a reference an element and field."""
    h5py = pytest.importorskip("h5py")

    def put(file, value):
        place = f"#refs#/{len(file.require_group('#refs#'))}"
        if isinstance(value, dict):
            group = file.create_group(place)
            for field, inner in value.items():
                if isinstance(inner, dict):
                    for side, number in inner.items():
                        group[f"{field}/{side}"] = np.array([[float(number)]])
            return group.ref
        value = np.asarray(value)
        if value.size:
            file[place] = value.T
        else:
            file[place] = np.array(value.shape, np.uint64)
            file[place].attrs["MATLAB_empty"] = np.uint8(1)
        return file[place].ref

    with h5py.File(path, "w", userblock_size=512) as file:
        for field in rows[0]:
            references = [[put(file, row[field])] for row in rows]
            file.create_dataset(f"{name}/{field}", data=references, dtype=h5py.ref_dtype)
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512))


def animal_category(root, synset, boxes, heads, legs, save=save_v7):
    images = root / f"{synset}_obj" / "img" / "img"
    images.mkdir(parents=True)
    (root / synset).mkdir()
    rows = [{"obj": {"bndbox": dict(zip(SIDES, box, strict=True))}} for box in boxes]
    save(images.parent / "data.mat", "samples", rows)
    for part, places in ((1, heads), (2, legs)):
        if places is not None:
            rows = [
                {"pHW_center": np.array(p, float).reshape(-1, 1) if p else np.zeros((0, 0))}
                for p in places
            ]
            save(root / synset / f"truth_part{part:02}.mat", "truth", rows)
    for place in range(len(boxes)):
        pixels = np.zeros((90, 120, 3), np.uint8)
        pixels[:, :60, 0] = 255
        Image.fromarray(pixels).save(images / f"{place + 1:05}.jpg", quality=95)


def repaint(root, seed):
    """Photographs of noise, each its own."""
    for place, path in enumerate(sorted(root.rglob("*.jpg"))):
        with Image.open(path) as image:
            shape = (image.height, image.width, 3)
        pixels = np.random.default_rng((seed, place)).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(path, quality=95)


def voc_tree(root):
    """Twelve photographs to train on and four to test on, of two animals of a kind each."""
    left, right = block(0, 0, 50, 50), block(50, 20, 100, 80)
    shown = {"train": {"cat": {}, "dog": {}}, "val": {"cat": {}, "dog": {}}}
    for place in range(16):
        name = f"2008_{place:06}"
        kind = ("cat", "dog")[place % 2]
        objects = [(kind, 8, mask, {"head": mask, "neck": mask}) for mask in (left, right)]
        annotate(root, name, objects)
        shown["train" if place < 12 else "val"][kind][f"_{name}"] = 1
    for split, kinds in shown.items():
        for kind, names in kinds.items():
            voc_list(root, kind, split, **names)
    repaint(root, 0)
    return root


def cub_tree(root):
    """Two species, ten photographs of each, of which six are to train on."""
    species = ("001.Auk", "002.Wren")
    names = {i: f"{species[i % 2]}/bird_{i}.jpg" for i in range(1, 21)}
    write_lines(root / "images.txt", names.items())
    write_lines(root / "classes.txt", enumerate(species, 1))
    write_lines(root / "image_class_labels.txt", [(i, 1 + i % 2) for i in names])
    write_lines(root / "train_test_split.txt", [(i, int(i <= 12)) for i in names])
    write_lines(root / "bounding_boxes.txt", [(i, 5.0, 5.0, 40.0, 30.0) for i in names])
    write_lines(root / "parts" / "parts.txt", enumerate(PARTS, 1))
    points = [(i, part, 10.0 + part, 20.0, 1) for i in names for part in range(1, 16)]
    write_lines(root / "parts" / "part_locs.txt", points)
    for name in names.values():
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 50)).save(path)
    repaint(root, 1)
    return root


def animal_tree(root):
    """Twenty foxes and twenty goldfish, in one folder with the places of their parts."""
    boxes, places = [(1, 1, 90, 70)] * 20, [(100, 100)] * 20
    animal_category(root, FOX, boxes, places, places)
    animal_category(root, GOLDFISH, boxes, places, None)
    repaint(root, 2)
    return root


def folder_tree(root, names=("ant", "bee"), splits=(("train", 20), ("test", 3)), below=""):
    """Noise, in folders of classes."""
    for split, count in splits:
        for index, name in enumerate(names):
            (root / split / name / below).mkdir(parents=True)
            for i in range(count):
                random = np.random.default_rng((len(split), index, i))
                pixels = random.integers(0, 256, (12, 9, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / below / f"{i}.png")
    return root


def cifar_tree(root, classes=2):
    """The batches of CIFAR-10, or CIFAR-100's files, of two classes with two images a batch."""
    hundred = classes == 100
    folder = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir()
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    sizes = dict.fromkeys(batches, 4) if not hundred else {"train": 20, "test": 4}
    for place, (name, count) in enumerate(sizes.items()):
        pixels = np.random.default_rng(place).integers(0, 256, (count, 3072), np.uint8)
        labels = "fine_labels" if hundred else "labels"
        content = {"data": pixels, labels: [i % 2 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps(content))
    meta, key = ("meta", "fine_label_names") if hundred else ("batches.meta", "label_names")
    (folder / meta).write_bytes(pickle.dumps({key: ["airplane", "automobile"]}))
    return root


def cifar100_tree(root):
    return cifar_tree(root, 100)


def stl_tree(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    write_lines(folder / "class_names.txt", [("airplane",), ("bird",)])
    for split, count in (("train", 20), ("test", 4)):
        random = np.random.default_rng(count)
        random.integers(0, 256, (count, 3, 96, 96), np.uint8).tofile(folder / f"{split}_X.bin")
        (np.arange(count, dtype=np.uint8) % 2 + 1).tofile(folder / f"{split}_y.bin")
    return root


WNIDS = ("n01443537", "n01629819")


def tiny_tree(root):
    folder_tree(root, WNIDS, [("train", 20)], below="images")
    folder_tree(root / "val", ["images"], [("", 6)])
    write_lines(root / "wnids.txt", [(wnid,) for wnid in reversed(WNIDS)])
    words = ["goldfish, Carassius auratus", "European fire salamander, Salamandra salamandra"]
    rows = [f"{wnid}\t{word}" for wnid, word in zip(WNIDS, words, strict=True)]
    (root / "words.txt").write_text("\n".join(rows) + "\n")
    rows = [f"{i}.png\t{WNIDS[i % 2]}\t0\t0\t9\t9" for i in range(6)]
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root


def imagenet_tree(root):
    return folder_tree(root, WNIDS, [("train", 20), ("val", 3)])


def shard(path, samples):
    """A tar file of files by name; a picture is an array, a label an int."""
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            if isinstance(content, np.ndarray):
                file = io.BytesIO()
                Image.fromarray(content).save(file, "PNG")
                content = file.getvalue()
            elif isinstance(content, int):
                content = str(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shard_tree(root, per_shard=(10, 7, 12, 11), test=(3, 3)):
    """Shards of noise in two classes, of different lengths."""
    for split, counts in (("train", per_shard), ("test", test)):
        number = 0
        for i, count in enumerate(counts):
            samples = []
            for _ in range(count):
                pixels = np.random.default_rng((len(split), number)).integers(0, 256, (12, 9, 3))
                samples += [
                    (f"{number:04}.png", pixels.astype(np.uint8)),
                    (f"{number:04}.cls", number % 2),
                ]
                number += 1
            shard(root / f"{split}-{i:02}.tar", samples)
    return root
