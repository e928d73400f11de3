"""Decodes an image file to an array.

An image is read as 8-bit grey or RGB if this changes no pixel, or if the conversion has only one
definition (JPEG's YCbCr, CMYK). Everything else is refused, never truncated.
"""

import io
from collections import Counter
from functools import cache
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from torch_utils.errors import UserError


class Mode(NamedTuple):
    """How images of one Pillow mode are read."""

    channels: int  # 1 (grey), 3 (RGB), or 0: refused
    rule: str  # as in docs/images.md
    alpha: bool = False
    lossy: bool = False  # counted as a conversion


_OPAQUE = "if alpha is 255 everywhere; else refused"
_DEEP = "refused: more than 8 bits per channel"
MODES = {
    "1": Mode(1, "grey, 0 or 255"),
    "L": Mode(1, "grey"),
    "LA": Mode(1, f"grey {_OPAQUE}", alpha=True),
    "La": Mode(1, f"grey {_OPAQUE}", alpha=True),
    "P": Mode(3, "RGB, the colours of the palette; with transparency as RGBA"),
    "PA": Mode(3, f"RGB {_OPAQUE}", alpha=True),
    "RGB": Mode(3, "RGB"),
    "RGBA": Mode(3, f"RGB {_OPAQUE}", alpha=True),
    "RGBa": Mode(3, f"RGB {_OPAQUE}", alpha=True),
    "RGBX": Mode(3, "RGB, the padding is dropped"),
    "CMYK": Mode(3, "RGB by Pillow's formula, without a colour profile; counted", lossy=True),
    "YCbCr": Mode(3, "RGB by JPEG's formula; counted", lossy=True),
    "LAB": Mode(0, "refused: needs a colour profile"),
    "HSV": Mode(0, "refused: no file format stores it"),
    "I": Mode(0, _DEEP),
    "I;16": Mode(0, _DEEP),
    "I;16L": Mode(0, _DEEP),
    "I;16B": Mode(0, _DEEP),
    "I;16N": Mode(0, _DEEP),
    "F": Mode(0, _DEEP),
}

# Formats recognised for any file name, since names are often wrong.
_COMMON = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Formats read if the file name has their extension. Left out of Pillow's list: EPS and WMF (they
# start other programs), BUFR, GRIB and HDF5 (Pillow has no decoder), MPEG and FLI (films), FITS,
# MCIDAS and SPIDER (measurements, not 8-bit pixels), IPTC, IMT and XVTHUMB (no extension).
_BY_NAME = (
    *("BLP", "CUR", "DCX", "DDS", "DIB", "FTEX", "GBR", "ICNS", "ICO", "IM", "JPEG2000", "MSP", "PCD", "PCX"),
    *("PIXAR", "PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "XBM", "XPM"),
)
_SEVERAL_FRAMES_ARE_ONE_IMAGE = ("MPO", "PSD")  # photo and depth map or preview; layers

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def image_extensions() -> dict[str, str]:
    """Extensions of the formats that are read, in lower case, with the name of the format."""
    known = {ext: "JPEG" if kind == "MPO" else kind for ext, kind in Image.registered_extensions().items()}
    return {ext: kind for ext, kind in known.items() if kind in Image.OPEN and kind in (*_COMMON, *_BY_NAME)}


@cache
def _formats(extension: str) -> tuple[str, ...]:
    own = image_extensions().get(extension)
    common = [kind for kind in _COMMON if kind in Image.OPEN]  # some builds of Pillow lack formats
    return tuple(common if own is None or own in common else [*common, own])


def open_image(file, name: str) -> Image.Image:
    """The image with only its header read. UserError with the name of the file."""
    try:
        image = Image.open(file, formats=_formats(PurePosixPath(name).suffix.lower()))
    except Exception as exc:
        raise _unreadable(exc, name) from None
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):  # Pillow itself only warns
        raise _unreadable(Image.DecompressionBombError(), name)
    return image


def decode_image(data: bytes, name: str, done: Counter | None = None) -> np.ndarray:
    """The bytes of an image file -> uint8 [C,H,W] with C = 1 (grey) or 3 (RGB); see ``MODES``.

    data: the bytes.
    name: name of the file, for messages.
    done: counts conversions, by description. Default None.

    Raises UserError for damaged files, more than 8 bits per channel, transparent pixels,
    animations, and images beyond Pillow's decompression-bomb limit.
    """
    if not data:
        raise UserError(f"{name}: the file is empty; remove or replace it")
    image = open_image(io.BytesIO(data), name)
    changes = []
    try:
        if image.format not in _SEVERAL_FRAMES_ARE_ONE_IMAGE and getattr(image, "is_animated", False):
            raise UserError(f"{name}: holds several frames or pages; save the ones you want as single images")
        if _bits(image, data) > 8:
            raise _refused(name, image.mode, _DEEP)
        image = _upright(image, changes)
        mode = MODES.get(image.mode, Mode(0, "refused: unknown"))  # known only after loading for some formats
        if not mode.channels:
            raise _refused(name, image.mode, mode.rule)
        if mode.alpha or "transparency" in image.info or (image.mode == "P" and image.palette.mode.endswith("A")):
            image = image.convert("LA" if mode.channels == 1 else "RGBA")
            if image.getchannel("A").getextrema()[0] < 255:
                raise UserError(f"{name}: has transparent pixels; put it on a background, as 8-bit grey or RGB")
            changes.append("with an opaque alpha channel, dropped")
        if mode.lossy:
            changes.append(f"{image.mode}, made RGB")
        wanted = "L" if mode.channels == 1 else "RGB"
        array = np.asarray(image if image.mode == wanted else image.convert(wanted), dtype=np.uint8)
        del image  # frees as much memory as the array takes
        if array.ndim == 2:
            array = array[:, :, None]
        array = np.ascontiguousarray(array.transpose(2, 0, 1))
    except Exception as exc:  # Pillow's exceptions for damaged files depend on the format
        raise _unreadable(exc, name) from None
    if done is not None:
        done.update(changes)
    return array


def header_channels(file, name: str) -> int:
    """Channels (1 or 3) that ``decode_image`` would return. file: open at its start."""
    head = file.read(26)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":  # five times as fast as Pillow
        return 1 if head[25] in (0, 4) else 3
    file.seek(0)
    return MODES.get(open_image(file, name).mode, MODES["RGB"]).channels or 3


def _refused(name: str, mode: str, rule: str) -> UserError:
    return UserError(f"{name}: image mode {mode} is {rule}; convert it to 8-bit grey or RGB")


def _unreadable(exc: Exception, name: str) -> UserError:
    if isinstance(exc, UserError):
        return exc
    if isinstance(exc, Image.DecompressionBombError):
        return UserError(f"{name}: the image claims more than {Image.MAX_IMAGE_PIXELS} pixels; refused")
    if isinstance(exc, MemoryError):
        return UserError(f"{name}: the image does not fit into memory")
    if isinstance(exc, UnidentifiedImageError):
        return UserError(f"{name}: not a readable image; remove or replace it")
    return UserError(f"{name}: damaged image ({str(exc)[:200]}); remove or replace it")


def _upright(image: Image.Image, changes: list[str]) -> Image.Image:
    """The image with its pixels loaded, turned upright by its EXIF or XMP data."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data does not affect the pixels
        image.load()
        changes.append("with unreadable EXIF data, not turned")
        return image
    image.load()
    if orientation not in _UPRIGHT:
        return image
    changes.append("turned upright (EXIF)")
    if image.getexif().get(_ORIENTATION) != orientation:  # Pillow itself turns TIFF images
        return image
    return image.transpose(_UPRIGHT[orientation])


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits per channel of the file, since Pillow silently reduces 16 bits to 8 in some formats."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))  # BitsPerSample
    if image.format == "SGI":
        return 8 * data[3]
    if image.format == "PPM":
        codec, _, _, args = image.tile[0]
        return int(args[1]).bit_length() if codec.startswith("ppm") and len(args) > 1 else 8
    if image.format == "JPEG2000":
        start = data.find(b"\xff\x4f\xff\x51") + 40  # position of the number of channels, in the SIZ marker
        count = int.from_bytes(data[start : start + 2], "big")
        return max((size & 0x7F) + 1 for size in data[start + 2 : start + 2 + 3 * count : 3])
    if image.format == "AVIF":
        start = data.find(b"av1C")
        return 10 if start >= 0 and data[start + 6] & 0x40 else 8
    if image.format == "DDS":
        return 16 if "BC6" in str(image.tile) else 8
    return 8
