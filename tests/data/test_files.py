"""Images of every kind become upright ones of three colours of 8 bits, or are named."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from picnn_fast.data import ImageFolderDataModule, Preprocessing
from picnn_fast.data.files import DamagedFileError, open_image, rgb

RED = (200, 30, 40)


def _png_of_16_bits(path, kind, *samples):
    """Two rows of two equal pixels, of samples of 16 bits."""

    def chunk(name, content):
        whole = name + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    row = b"\0" + 2 * struct.pack(f">{len(samples)}H", *samples)
    head = struct.pack(">IIBBBBB", 2, 2, 16, kind, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(2 * row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def _saved(mode, path):
    image = Image.new("RGB", (4, 4), RED)
    if mode == "P, transparent":
        image.quantize(4).save(path, transparency=bytes([255, 0, 0, 0]))
    elif mode == "P":
        image.quantize(4).save(path)
    else:
        image.convert(mode).save(path)


@pytest.mark.parametrize(
    ("mode", "name", "colour"),
    [
        ("L", "grey.png", (82, 82, 82)),
        ("LA", "grey and alpha.png", (82, 82, 82)),
        ("1", "black and white.png", None),
        ("P", "palette.gif", RED),
        ("P, transparent", "palette.png", RED),
        ("RGBA", "alpha.png", RED),
        ("CMYK", "print.jpg", RED),
        ("CMYK", "print.tif", RED),
        ("YCbCr", "video.jpg", RED),
    ],
)
def test_every_mode_becomes_three_colours(tmp_path, mode, name, colour):
    _saved(mode, tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(tmp_path / name)
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    if colour is not None:
        assert np.abs(pixels - colour).max() <= 4  # JPEG rounds
    else:
        assert set(pixels.ravel()) <= {0, 255}


@pytest.mark.parametrize(
    ("kind", "samples", "colour"),
    [
        (0, (0x4000,), (64, 64, 64)),
        (4, (0x4000, 0xFFFF), (64, 64, 64)),
        (2, (0xFFFF, 0x8000, 0x0000), (255, 128, 0)),
        (6, (0xFFFF, 0x8000, 0x0000, 0xFFFF), (255, 128, 0)),
    ],
    ids=["grey", "grey and alpha", "colour", "colour and alpha"],
)
def test_16_bits_are_scaled_to_8(tmp_path, kind, samples, colour):
    _png_of_16_bits(tmp_path / "deep.png", kind, *samples)
    pixels = np.asarray(open_image(tmp_path / "deep.png")).astype(int)
    assert pixels.shape == (2, 2, 3)
    assert np.abs(pixels - colour).max() <= 1


def test_images_are_turned_as_their_exif_tag_says(tmp_path):
    """Each of the eight ways, of a picture with a red corner at the top left and a green right."""
    upright = Image.new("RGB", (48, 32))
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    upright.paste((0, 255, 0), (32, 0, 48, 32))
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    for tag, ways in stored.items():
        image = upright
        for way in ways:
            image = image.transpose(way)
        exif = Image.Exif()
        exif[0x0112] = tag
        for name in ("turned.png", "turned.jpg"):
            image.save(tmp_path / name, exif=exif, quality=95)
            read = open_image(tmp_path / name)
            assert read.size == (48, 32), (tag, name)
            difference = np.asarray(read).astype(int) - np.asarray(upright)
            assert np.abs(difference).mean() < 2, (tag, name)


def _folder(root, files):
    """A data set whose first test image is one of ``files``, each a name and how it is written."""
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), RED).save(root / split / name / f"x{i}.png")
    for name, write in files.items():
        write(root / "test" / "ant" / name)
    return ImageFolderDataModule(root, image_size=8, num_workers=0, validation=0)


def _cut_short(path):
    kept = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(kept, path.suffix[1:].replace("jpg", "jpeg"))
    path.write_bytes(kept.getvalue()[: len(kept.getvalue()) // 2])


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("0.jpg", _cut_short, "truncated"),
        ("0.png", _cut_short, "truncated"),
        ("0.png", lambda path: path.write_bytes(b""), "cannot identify"),
        ("0.jpg", lambda path: path.write_text("<html>404</html>"), "cannot identify"),
    ],
    ids=["JPEG cut short", "PNG cut short", "empty", "a page"],
)
def test_a_damaged_image_is_named_in_a_line(tmp_path, name, write, said):
    data = _folder(tmp_path, {name: write})
    with pytest.raises(DamagedFileError, match="cannot be read as an image") as caught:
        data.test_set[0]
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'test' / 'ant' / name} ")
    assert said in text
    assert "\n" not in text


def test_a_large_photograph_is_read_and_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    data = _folder(tmp_path, {"0.png": Image.new("RGB", (30, 30), RED).save})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.test_set[0][0].shape == (3, 8, 8)  # Pillow alone warns above its limit
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(DamagedFileError, match=r"0\.png cannot be read .*\(900 pixels\) exceeds"):
        data.test_set[0]


def test_numbers_of_no_known_range_are_refused():
    with pytest.raises(ValueError, match=r"mode 'F', of no known range"):
        rgb(Image.new("F", (2, 2)))


def test_a_large_jpeg_is_decoded_small_with_hardly_a_difference(tmp_path):
    """To no fewer pixels than twice those that are needed."""
    rows, columns = np.mgrid[0:640, 0:960] / 40
    waves = [128 + 100 * np.sin(rows * a + columns * b) for a, b in ((1, 2), (2, 1), (1, -1))]
    image = Image.fromarray(np.stack(waves, 2).astype(np.uint8))
    image.save(tmp_path / "large.jpg", quality=95)
    sizes = {least: open_image(tmp_path / "large.jpg", least).size for least in (640, 320, 100, 20)}
    assert sizes == {640: (960, 640), 320: (480, 320), 100: (240, 160), 20: (120, 80)}
    assert open_image(tmp_path / "large.jpg").size == (960, 640)
    way = Preprocessing(128, 160)
    assert way.least == 320
    whole = np.asarray(way.prepare(open_image(tmp_path / "large.jpg"))).astype(int)
    small = np.asarray(way.prepare(open_image(tmp_path / "large.jpg", way.least))).astype(int)
    assert np.abs(whole - small).max() <= 12
    assert np.abs(whole - small).mean() < 1
    _, shown = way.read(tmp_path / "large.jpg")
    assert torch.equal((shown * 255).round().permute(1, 2, 0).int(), torch.from_numpy(small).int())
