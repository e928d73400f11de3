"""What people's folders and archives hold: formats, modes, depths, and files that are no images."""

import contextlib
import io
import json
import os
import signal
import struct
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps

from evaluation.fid import calculate_fid
from evaluation.reading import read_batches
from tools import dataset_tool
from tools.dataset_tool import make_dataset
from tools.train_denoiser import load_data
from torch_utils.errors import UserError
from torch_utils.image_decoding import MODES, _bits, decode_image, image_extensions
from torch_utils.images import ImageSource, load_array
from torch_utils.session import Interrupted, raised_sigterm

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)


def encode(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path: Path, files: dict[str, bytes], kind=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo()
            info.filename, info.compress_type = name, kind  # the constructor would turn back-slashes on Windows
            archive.writestr(info, data)
    return path


# --------------------------------------------------------------------------------------------------
# Formats


LOSSLESS = {
    "a.png": {},
    "b.webp": {"lossless": True},
    "c.BMP": {},
    "d.tif": {"compression": "tiff_lzw"},
    "e.ppm": {},
    "f.tga": {},
    "g.jp2": {"irreversible": False},
    "h.sgi": {},
    "i.pcx": {},
    "k.dib": {},
    "l.TIFF": {},
    "m.dds": {},
    "n.ico": {"sizes": [(8, 8)]},
}


def test_every_still_format_is_read_by_every_reader(tmp_path, capsys):
    files = {}
    for name, options in LOSSLESS.items():
        files[name] = encode(COLOUR, image_extensions()[Path(name).suffix.lower()], **options)
    put(tmp_path / "in", files)
    pack(tmp_path / "in.zip", files)
    expected = np.broadcast_to(COLOUR.transpose(2, 0, 1), (len(files), 3, 8, 8))
    for source in ("in", "in.zip"):
        np.testing.assert_array_equal(load_array(tmp_path / source), expected)
    assert make_dataset(tmp_path / "in", tmp_path / "out.zip") == len(files)
    np.testing.assert_array_equal(load_array(tmp_path / "out.zip"), expected)
    assert "ignored" not in capsys.readouterr().err
    for name in ("photo.jfif", "photo.JPG", "photo.avif", "photo.mpo"):
        kind = image_extensions()[Path(name).suffix.lower()]
        decoded = decode_image(encode(Image.new("RGB", (8, 8), (250, 10, 30)), kind), name)
        assert np.abs(decoded.mean(axis=(1, 2)) - [250, 10, 30]).max() < 6


def test_names_that_lie_about_the_format(tmp_path):
    for kind in ("PNG", "WEBP", "BMP", "TIFF", "GIF"):
        image = Image.fromarray(COLOUR).quantize(8)
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(image if kind != "WEBP" else image.convert("RGB"), kind, **options)
        np.testing.assert_array_equal(decode_image(data, "x.jpg"), expected)
    for data, message in ((b"", "file is empty"), (b"<html>404</html>", "not a readable image"), (b"x", "not a read")):
        with pytest.raises(UserError, match=f"x.jpg: .*{message}"):
            decode_image(data, "x.jpg")


def test_animations_and_stacks_are_no_images():
    frames = [Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        data = encode(frames[0].convert("RGB"), kind, save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match="x: holds several frames or pages"):
            decode_image(data, "x")
        assert decode_image(encode(frames[0].convert("RGB"), kind, save_all=True), "x").shape[1:] == (8, 8)
    photo = Image.new("RGB", (8, 8), (250, 10, 30))  # phones keep a depth map or a preview as the second image
    decoded = decode_image(encode(photo, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))]), "x.jpg")
    assert np.abs(decoded.mean(axis=(1, 2)) - [250, 10, 30]).max() < 6


# --------------------------------------------------------------------------------------------------
# Modes and depths


def test_every_mode_has_a_rule_that_the_documents_tell():
    known = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
    assert set(MODES) == known | {"I", "I;16", "I;16L", "I;16B", "I;16N", "F"}
    page = (ROOT / "docs" / "images.md").read_text(encoding="utf-8")
    for mode, (channels, rule, _, _) in MODES.items():
        assert f"| `{mode}` | {rule} |" in page
        assert channels == (0 if rule.startswith("refused") else 1 if rule.startswith("grey") else 3)


def with_alpha(image: Image.Image, opaque: bool) -> Image.Image:
    alpha = Image.new("L", image.size, 255)
    if not opaque:
        alpha.putpixel((3, 3), 254)
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize("opaque", [True, False])
def test_alpha_is_dropped_only_where_it_says_nothing(opaque):
    palette = Image.fromarray(COLOUR).quantize(16)
    grey, colours = GREY[None], COLOUR.transpose(2, 0, 1)
    of_palette = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    unused = 200 if opaque else palette.getpixel((3, 3))
    with_key = Image.fromarray(COLOUR)
    key = (1, 2, 3) if opaque else tuple(int(value) for value in COLOUR[3, 3])
    assert not (COLOUR == (1, 2, 3)).all(axis=2).any() and not (GREY == 77).any()
    cases = [
        (encode(with_alpha(Image.fromarray(GREY), opaque)), grey),
        (encode(with_alpha(Image.fromarray(COLOUR), opaque)), colours),
        (encode(with_alpha(Image.fromarray(COLOUR), opaque), "WEBP", lossless=True, exact=True), colours),
        (encode(with_alpha(Image.fromarray(COLOUR), opaque), "TIFF"), colours),
        (encode(with_alpha(Image.fromarray(GREY), opaque), "TIFF"), grey),
        (encode(palette, transparency=unused), of_palette),
        (encode(palette, transparency=bytes([255] * 16) if opaque else bytes([128] * 16)), of_palette),
        (encode(with_key, transparency=key), colours),
        (encode(Image.fromarray(GREY), transparency=77 if opaque else int(GREY[0, 0])), grey),
    ]
    for data, expected in cases:
        if opaque:
            done = Counter()
            np.testing.assert_array_equal(decode_image(data, "x.png", done), expected)
            assert not done or done == {"with an opaque alpha channel, dropped": 1}
        else:
            with pytest.raises(UserError, match="x.png: has transparent pixels"):
                decode_image(data, "x.png")


@pytest.mark.parametrize("alpha", [255, 254])
def test_alpha_of_a_palette(alpha):
    head = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 2, 1, 8, 0x20)
    data = head + bytes([3, 2, 1, 255]) + bytes([6, 5, 4, alpha]) + bytes([0, 1])
    if alpha == 255:
        assert decode_image(data, "x.tga").tolist() == [[[1, 4]], [[2, 5]], [[3, 6]]]
    else:
        with pytest.raises(UserError, match="x.tga: has transparent pixels"):
            decode_image(data, "x.tga")


def test_inexact_modes_are_counted():
    cmyk = Image.fromarray(RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8), "CMYK")
    done = Counter()
    decoded = decode_image(encode(cmyk, "TIFF"), "x.tif", done)
    ink = np.asarray(cmyk).astype(int)
    expected = 255 - np.minimum(255, ink[..., :3] * (255 - ink[..., 3:]) / 255 + ink[..., 3:])
    assert np.abs(decoded.transpose(1, 2, 0) - expected).max() <= 1 and done == {"CMYK, made RGB": 1}
    photo = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # as the few in ImageNet
    assert np.abs(decode_image(encode(photo, "JPEG"), "x.jpg").mean(axis=(1, 2)) - [255, 0, 0]).max() < 6


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(colour_type, channels):
    rows = b"".join(b"\0" + RNG.bytes(8 * channels) for _ in range(4))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff(bits):
    """RGB, 1x1, little-endian, uncompressed."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 210)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 6)]
    data = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    data += b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return data.ljust(200, b"\0") + struct.pack("<HHH", bits, bits, bits).ljust(10, b"\0") + bytes(range(6))


def test_more_than_8_bits_are_never_cut_silently():
    """Pillow itself opens several of these as 8-bit RGB, with the lower half of the bits gone."""
    sixteen = np.full((8, 8), 700, dtype=np.uint16)
    jp2 = bytearray(encode(COLOUR, "JPEG2000", no_jp2=True))
    at = jp2.find(b"\xff\x51") + 2 + 38  # depth of the first component
    assert jp2[at] == 7
    jp2[at] = 11
    sgi = bytearray(encode(COLOUR, "SGI"))
    sgi[3] = 2
    deep = {
        "grey.png": encode(sixteen),
        "grey.tif": encode(sixteen, "TIFF"),
        "grey.jp2": encode(sixteen, "JPEG2000"),
        "float.tif": encode(np.zeros((8, 8), dtype=np.float32), "TIFF"),
        "int.tif": encode(np.zeros((8, 8), dtype=np.int32), "TIFF"),
        "grey.pgm": b"P5 2 2 4095\n" + bytes(8),
        "colour.ppm": b"P6 2 2 65535\n" + bytes(24),
        "plain.ppm": b"P3 1 1 1023\n1 2 3\n",
        "float.pfm": b"Pf\n2 2\n-1.0\n" + bytes(16),
        "colour.tif": deep_tiff(16),
        "colour.jp2": bytes(jp2),
        "colour.sgi": bytes(sgi),
    }
    deep |= {f"{kind}.png": deep_png(kind, channels) for kind, channels in ((0, 1), (2, 3), (4, 2), (6, 4))}
    for name, data in deep.items():
        with pytest.raises(UserError, match=f"{name}: .*more than 8 bits per channel.*convert it"):
            decode_image(data, name)
    avif = bytearray(encode(COLOUR, "AVIF"))
    assert _bits(SimpleNamespace(format="AVIF"), avif) == 8
    avif[avif.find(b"av1C") + 6] |= 0x40  # the flag high_bitdepth, without the bits
    assert _bits(SimpleNamespace(format="AVIF"), avif) == 10
    for name, data in {
        "a.ppm": b"P6 1 1 255\n\1\2\3",
        "b.pgm": b"P5 1 1 100\n\x64",
        "c.pbm": b"P4 8 1\n\x0f",
        "d.tif": deep_tiff(8),
    }.items():
        assert decode_image(data, name).dtype == np.uint8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind):
    image = Image.fromarray(np.kron(RNG.integers(0, 256, (2, 3), dtype=np.uint8), np.ones((8, 8), dtype=np.uint8)))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(image.convert("RGB"), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
        done = Counter()
        decoded = decode_image(data, "x", done)
        with Image.open(io.BytesIO(data)) as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        np.testing.assert_array_equal(decoded, expected.transpose(2, 0, 1))
        assert decoded.shape[1:] == ((24, 16) if orientation > 4 else (16, 24))
        assert done == ({"turned upright (EXIF)": 1} if orientation > 1 else {})
    plain, done = encode(image.convert("RGB"), "JPEG"), Counter()
    damaged = plain[:2] + b"\xff\xe1\x00\x14Exif\0\0" + b"\xff" * 12 + plain[2:]
    np.testing.assert_array_equal(decode_image(damaged, "x", done), decode_image(plain, "x"))


# --------------------------------------------------------------------------------------------------
# Colours of a set


def test_grey_among_colours_becomes_rgb(tmp_path, capsys):
    """A grey first file as well, which is why the headers are looked at."""
    jpeg = encode(GREY, "JPEG", quality=100)
    grey = decode_image(jpeg, "x.jpg")
    for first in (True, False):
        folder = put(tmp_path / str(first), {f"{'a' if first else 'z'}.jpg": jpeg, "m.png": encode(COLOUR)})
        array = load_array(folder)
        np.testing.assert_array_equal(array[0 if first else 1], np.repeat(grey, 3, axis=0))
        np.testing.assert_array_equal(array[1 if first else 0], COLOUR.transpose(2, 0, 1))
        assert f"Note: {folder}: images grey, made RGB: 1\n" in capsys.readouterr().err
        make_dataset(folder, tmp_path / f"{first}.zip", (4, 4), "center-crop")
        assert ImageSource(tmp_path / f"{first}.zip").shape == (3, 4, 4)
        assert "grey, made RGB: 1" in capsys.readouterr().err
    folder = put(tmp_path / "first", {"a.png": encode(COLOUR), "b.png": b"not looked at"})
    assert ImageSource(folder).shape == (3, 8, 8)
    assert load_array(put(tmp_path / "grey", {"a.jpg": jpeg, "b.png": encode(GREY)})).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_conversions_are_counted_over_threads_and_processes(tmp_path, workers):
    files = {f"{seed:03d}.png": encode(GREY if seed % 3 == 0 else COLOUR) for seed in range(10)}
    source = ImageSource(put(tmp_path / "in", files))
    for rounds in (1, 2):
        list(read_batches(source, range(10), 3, workers=workers))
        assert source.conversions == {"grey, made RGB": 4 * rounds}


def digits(count):
    return [RNG.integers(0, 256, (32, 32), dtype=np.uint8) for _ in range(count)]


def test_fid_of_mixed_formats_is_that_of_png(tmp_path):
    """Half are WebP, which has no grey: equal channels count as grey for a grey detector."""
    images = digits(20)
    png = put(tmp_path / "png", {f"{seed:06d}.png": encode(image) for seed, image in enumerate(images)})
    mixed = {}
    for seed, image in enumerate(images):
        colour = Image.fromarray(image).convert("RGB")
        kinds = [
            (".png", encode(image)),
            (".webp", encode(colour, "WEBP", lossless=True)),
            (".bmp", encode(image, "BMP")),
        ]
        ending, data = kinds[seed % 3]
        mixed[f"{seed:06d}{ending}"] = data
    first, second = calculate_fid(png, "digits"), calculate_fid(put(tmp_path / "mixed", mixed), "digits")
    assert (second.images, second.fid) == (20, first.fid)
    put(tmp_path / "mixed", {"000020.png": encode(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))})
    with pytest.raises(UserError, match="000020.png: RGB image, expected grey-scale, which .* 'digits' takes"):
        calculate_fid(tmp_path / "mixed", "digits")


# --------------------------------------------------------------------------------------------------
# What else lies in folders and archives


def test_what_is_no_image_is_counted(tmp_path, capsys):
    image = encode(GREY)
    others = {
        ".ipynb_checkpoints/a-checkpoint.png": image,
        "cats/.hidden.png": image,
        "__MACOSX/cats/._a.png": b"\0\5\x16\7",
        "cats/._a.png": b"\0\5\x16\7",
        "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg": image,
        "Thumbs.db": b"x",
        "desktop.ini": b"x",
        ".DS_Store": b"x",
        "notes.txt": b"x",
        "more.TXT": b"x",
        "photo.HEIC": b"x",
        "inner.zip": b"x",
        "film.mp4": b"x",
        "README": b"x",
        "odd.\x1b[31m": b"x",
        "metadata.csv": b"x",
    }
    files = {"cats/a.png": image, "cats/b.PNG": image, **others}
    put(tmp_path / "in", files)
    pack(tmp_path / "in.zip", files)
    for name in ("in", "in.zip"):
        assert ImageSource(tmp_path / name).names == ["cats/a.png", "cats/b.PNG"]
        said = capsys.readouterr().err
        assert said.startswith(
            f"Note: {tmp_path / name}: 16 files ignored: 3 hidden, 2 .txt, 2 of macOS (AppleDouble), "
        )
        for part in ("1 in system folders", "1 .db", "1 .ini", "1 .csv", "1 without extension", "1 of other kinds"):
            assert part in said
        for part in (
            "1 .heic (convert these to PNG to use them)",
            "1 .zip (unpack these to use",
            "1 .mp4 (make single im",
        ):
            assert part in said
        assert "\x1b" not in said and said.count("\n") == 1
    with pytest.raises(UserError, match="holds no image; 1 file ignored: 1 .txt$"):
        ImageSource(put(tmp_path / "text", {"a.txt": b"x"}))
    assert ImageSource(put(tmp_path / ".cache" / "images", {"a.png": image})).names == ["a.png"]


def test_links_are_followed_once(tmp_path, capsys):
    image = encode(GREY)
    put(tmp_path / "elsewhere", {"x/1.png": image, "2.png": image})
    folder = put(tmp_path / "in", {"a/0.png": image, ".store/9.png": image})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "a")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "same.png").symlink_to(folder / "a" / "0.png")
    (folder / "kept.png").symlink_to(folder / ".store" / "9.png")  # as git-annex and DVC keep them
    (folder / "gone.png").symlink_to(folder / "nothing.png")
    os.mkfifo(folder / "pipe.png")
    assert ImageSource(folder).names == ["a/0.png", "kept.png", "linked/2.png", "linked/x/1.png"]
    said = capsys.readouterr().err
    assert "6 files ignored" in said and "2 links to folders that are read already" in said
    for part in ("1 links to images that are read", "1 broken links", "1 no regular files", "1 hidden"):
        assert part in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read_are_no_empty_ones(tmp_path):
    folder = put(tmp_path / "in", {"a.png": encode(GREY), "b/b.png": encode(GREY)})
    (folder / "b").chmod(0)
    try:
        with pytest.raises(UserError, match="cannot be read"):
            ImageSource(folder)
    finally:
        (folder / "b").chmod(0o700)


def test_a_hundred_thousand_files_are_listed_in_seconds(tmp_path, monkeypatch):
    (tmp_path / "0.png").write_bytes(encode(GREY))

    class Entry:
        def __init__(self, name):
            self.name = name

        def is_symlink(self):
            return False

        is_dir = is_symlink

        def is_file(self):
            return True

    entries = [Entry(f"{seed:06d}.{'png' if seed % 2 else 'txt'}") for seed in range(100_000)]
    monkeypatch.setattr(os, "scandir", lambda folder: entries)
    start = time.process_time()
    source = ImageSource(tmp_path)
    assert len(source) == 50_000 and source.ignored == {".txt": 50_000} and time.process_time() - start < 5


def test_files_of_zips(tmp_path, capsys):
    """Of equal names the last counts; a folder around all is not a class; backslashes are /."""
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encode(GREY))
        archive.writestr("a.png", encode(255 - GREY))
    np.testing.assert_array_equal(load_array(tmp_path / "a.zip"), (255 - GREY)[None, None])
    assert "1 file ignored: 1 replaced by later ones of the same name" in capsys.readouterr().err
    labels = {"labels": [["00000\\img00000000.png", 1], ["00000/img00000001.png", 0]]}
    files = {"set\\00000\\img00000000.png": encode(GREY), "set\\00000\\img00000001.png": encode(255 - GREY)}
    pack(tmp_path / "b.zip", {**files, "set\\dataset.json": json.dumps(labels).encode()})
    source = ImageSource(tmp_path / "b.zip")
    assert source.names == ["set/00000/img00000000.png", "set/00000/img00000001.png"] and source.labels == [1, 0]
    np.testing.assert_array_equal(load_array(source)[:, 0], [GREY, 255 - GREY])
    assert source.fingerprint(0).startswith("set/00000/img00000000.png|")
    assert "ignored" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_unpack_without_limit_are_refused(tmp_path, kind):
    pack(tmp_path / "a.zip", {"a.png": encode(GREY)}, kind)
    with pytest.raises(
        UserError,
        match="a.zip:a.png: cannot be read .the part a.png is packed with (bzip2|lzma); only stored and deflate",
    ):
        load_array(tmp_path / "a.zip")
    pack(tmp_path / "b.zip", {"dataset.json": b"{}"}, kind)
    with zipfile.ZipFile(tmp_path / "b.zip", "a") as archive:
        archive.writestr("a.png", encode(GREY))
    with pytest.raises(UserError, match="b.zip:dataset.json: cannot be read .the part dataset.json is packed with"):
        ImageSource(tmp_path / "b.zip")
    pack(tmp_path / "c.zip", {"a.png": encode(GREY)}, zipfile.ZIP_DEFLATED)
    data = bytearray((tmp_path / "c.zip").read_bytes())
    data[data.find(b"PK\1\2") + 10] = data[8] = 9  # deflate64
    (tmp_path / "c.zip").write_bytes(data)
    with pytest.raises(UserError, match="c.zip:a.png: cannot be read .the part a.png is packed with deflate64"):
        load_array(tmp_path / "c.zip")
    pack(tmp_path / "d.zip", {"a.png": encode(GREY)}, zipfile.ZIP_DEFLATED)
    assert load_array(tmp_path / "d.zip").shape == (1, 1, 8, 8)


def test_what_is_unpacked_is_bounded(tmp_path):
    """Members that share their bytes, and a label file far larger than the images need."""
    data = bytearray(pack(tmp_path / "a.zip", {f"{i}.png": encode(GREY) for i in range(9)}).read_bytes())
    directory, size = data.find(b"PK\1\2"), len(encode(GREY))
    at = directory
    for _ in range(9):
        data[at + 20 : at + 24] = data[at + 24 : at + 28] = (size * 9).to_bytes(4, "little")
        at += 46 + int.from_bytes(data[at + 28 : at + 30], "little")
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="a.zip: cannot be read .its members claim more bytes"):
        ImageSource(tmp_path / "a.zip")
    pack(tmp_path / "b.zip", {"a.png": encode(GREY), "dataset.json": bytes(1 << 22)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="b.zip:dataset.json: unpacks to 4194304 bytes"):
        ImageSource(tmp_path / "b.zip")


# --------------------------------------------------------------------------------------------------
# Samples of several runs


def test_samples_of_two_runs_are_refused(tmp_path):
    images = [encode(image) for image in digits(6)]
    for run, seeds in (("euler", range(3)), ("heun", range(3, 6))):
        put(tmp_path / "both" / run, {f"{seed:06d}.png": images[seed] for seed in seeds})
    assert calculate_fid(tmp_path / "both", "digits").images == 6  # different seeds, no record: one set in two folders
    put(tmp_path / "both", {"euler/sampling.json": b"{}", "heun/sampling.json": b"{}"})
    with pytest.raises(UserError, match="both: holds the samples of 2 runs .euler/sampling.json, heun/sampling.json"):
        calculate_fid(tmp_path / "both", "digits")
    put(tmp_path / "twice", {"a/000001.png": images[0], "b/000001.webp": images[1], "a/000002.png": images[2]})
    with pytest.raises(UserError, match="a/000001.png and b/000001.webp have the same seed number"):
        calculate_fid(tmp_path / "twice", "digits")
    make_dataset(tmp_path / "twice", tmp_path / "twice.zip")  # the way out that the message names
    assert calculate_fid(tmp_path / "twice.zip", "digits").images == 3


def test_companions_of_a_run_one_level_down(tmp_path, capsys):
    image = encode(GREY)
    files = {"run/000000.png": image, "run/grid.png": image, "run/inters/000000.png": image, "run/sampling.json": b"{}"}
    assert ImageSource(put(tmp_path / "in", files)).names == ["run/000000.png"]
    assert "2 files ignored: 1 grid.png of sample.py, 1 in inters/ of sample.py" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Labels


def labels_of_edm(names):
    """As dataset_tool.py of NVIDIA's EDM determines them where there is no dataset.json."""
    toplevel_names = {name: name.split("/")[0] if "/" in name else "" for name in names}
    toplevel_indices = {name: index for index, name in enumerate(sorted(set(toplevel_names.values())))}
    return [toplevel_indices[toplevel_names[name]] for name in names]


@pytest.mark.parametrize("wrapped", ["", "photos/2024/"])
def test_labels_from_class_folders(tmp_path, capsys, wrapped):
    image = encode(GREY)
    names = ["dog/1.png", "cat/1.png", "cat/deep/2.png", "Zebra/1.png", "10/1.png", "9/1.png"]
    pack(tmp_path / "in.zip", {wrapped + name: image for name in names})
    put(tmp_path / "in", {wrapped + name: image for name in names})
    for source in ("in", "in.zip"):
        make_dataset(tmp_path / source, tmp_path / "out.zip", overwrite=True)
        assert f"Note: {tmp_path / source}: labels from 5 folders: 10=0, 9=1, Zebra=2, cat=3, dog=4\n" in (
            capsys.readouterr().err
        )
        with zipfile.ZipFile(tmp_path / "out.zip") as archive:
            content = json.loads(archive.read("dataset.json"))
        assert content["class_names"] == ["10", "9", "Zebra", "cat", "dog"]
        assert [label for _, label in content["labels"]] == labels_of_edm(sorted(names)) == [0, 1, 2, 3, 3, 4]
    make_dataset(tmp_path / "out.zip", tmp_path / "again.zip")  # the names stay
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "out.zip").read_bytes()
    assert load_data(tmp_path / "out.zip", True)[1].argmax(1).tolist() == [0, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "cat/b.png"],
        ["cat/a.png", "cat/b.png"],
        ["000000/000001.png", "001000/001234.png"],
        ["00000/img00000001.png", "00001/img00001000.png"],
    ],
)
def test_folders_that_are_no_classes(tmp_path, names):
    pack(tmp_path / "in.zip", dict.fromkeys(names, encode(GREY)))
    make_dataset(tmp_path / "in.zip", tmp_path / "out.zip")
    assert ImageSource(tmp_path / "out.zip").labels is None


@pytest.mark.parametrize("labels", [[0, 20230101], [1, 2], [0, 9999], [3, 10**18]])
def test_labels_with_gaps_are_one_line(tmp_path, capsys, labels):
    content = {"labels": [["a.png", labels[0]], ["b.png", labels[1]]]}
    files = {"a.png": encode(GREY), "b.png": encode(255 - GREY), "dataset.json": json.dumps(content).encode()}
    pack(tmp_path / "in.zip", files)
    with pytest.raises(UserError, match=f"labels go up to {labels[1]}, but 2 of these .* --renumber=True"):
        load_data(tmp_path / "in.zip", True)
    assert load_data(tmp_path / "in.zip", False)[1] is None
    make_dataset(tmp_path / "in.zip", tmp_path / "same.zip")
    assert f"Warning: {tmp_path / 'in.zip'}: the labels go up to {labels[1]}" in capsys.readouterr().err
    assert ImageSource(tmp_path / "same.zip").labels == labels
    make_dataset(tmp_path / "in.zip", tmp_path / "out.zip", renumber=True)
    source = ImageSource(tmp_path / "out.zip")
    assert (source.labels, source.class_names) == ([0, 1], [str(label) for label in labels])
    assert "Warning" not in capsys.readouterr().err
    np.testing.assert_array_equal(load_data(tmp_path / "out.zip", True)[1], np.eye(2))


def test_a_network_to_start_from_may_know_more_classes(tmp_path):
    content = {"labels": [["a.png", 2], ["b.png", 4]]}
    files = {"a.png": encode(GREY), "b.png": encode(255 - GREY), "dataset.json": json.dumps(content).encode()}
    np.testing.assert_array_equal(load_data(pack(tmp_path / "in.zip", files), True, gaps=True)[1], np.eye(5)[[2, 4]])


# --------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_dataset_tool_leaves_nothing(tmp_path, monkeypatch, number):
    np.savez(tmp_path / "data.npz", images=np.broadcast_to(GREY, (9, 8, 8)))
    left = tmp_path / "out" / ".old.zip-0123456789ab.part"  # of a run that was killed
    put(tmp_path / "out", {left.name: b"x"})
    os.utime(left, (1, 1))
    written = []

    def signalled(image):
        written.append(image)
        if len(written) == 5:
            assert len(list((tmp_path / "out").iterdir())) == 1  # the new temporary file
            os.kill(os.getpid(), number)
        return Image.fromarray(image[:, :, 0])

    monkeypatch.setattr(dataset_tool, "_to_pil", signalled)
    arguments = [f"--source={tmp_path / 'data.npz'}", f"--dest={tmp_path / 'out' / 'set.zip'}"]
    done = CliRunner().invoke(dataset_tool.main, arguments)
    assert done.exit_code == 128 + number and done.stderr.endswith(f"Interrupted by {number.name}\n"), done.output
    assert len(written) == 5 and list((tmp_path / "out").iterdir()) == []


def test_code_that_catches_every_exception_does_not_catch_signals(tmp_path):
    """As that of tqdm, when it starts its monitor, and of everything that reads damaged files."""
    with pytest.raises(Interrupted) as stopped, raised_sigterm(), contextlib.suppress(Exception):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.exit_code == 143
