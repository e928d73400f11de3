"""Limits of what a file may make us do, whichever code reads it: memory, sizes, references.

A file is read right or refused with a UserError; that a limit holds is measured, not looked up.
"""

import io
import pickle
import struct
import tracemalloc
import warnings
import zipfile
import zlib

import pytest
import torch
from PIL import Image

from torch_utils.errors import UserError
from torch_utils.images import ImageSource, decode_image
from torch_utils.safe_pickle import safe_load, safe_load_checkpoint

MIB = 1 << 20


# --------------------------------------------------------------------------------------------------
# Files of torch.save


class Reference:
    """Stands for a storage of the file. view: (key, offset, length), of the older format only."""

    def __init__(self, kind, key, count, view=None):
        self.identity, self.view = ("storage", kind, key, "cpu", count), view


class Tensor:
    """A one-dimensional tensor on a referenced storage."""

    def __init__(self, reference, count, offset=0):
        self.parts = (reference, offset, (count,), (1,), False, None)

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.parts


def pickled(content, legacy: bool = False) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Reference):
                return None
            return (*value.identity, value.view) if legacy or value.view else value.identity

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(content)
    return buffer.getvalue()


def zip_file(content, storages: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {"a/data.pkl": pickled(content), "a/version": b"3\n", "a/byteorder": b"little"}.items():
            archive.writestr(name, data)
        for key, data in storages.items():
            archive.writestr(f"a/data/{key}", data)
    return buffer.getvalue()


def legacy_file(content, storages: dict[str, bytes], itemsize: int = 4) -> bytes:
    """The format of torch.save before 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    data = [(len(part) // itemsize).to_bytes(8, "little") + part for part in storages.values()]
    return b"".join([*head, pickled(content, legacy=True), pickle.dumps(list(storages), 2), *data])


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


@pytest.mark.parametrize("write", [zip_file, legacy_file])
def test_files_made_here_are_read_as_torch_reads_them(write):
    storage = Reference(torch.FloatStorage, "0", 4)
    data = write({"a": Tensor(storage, 2, 1), "b": Tensor(storage, 4)}, {"0": floats(1, 2, 3, 4)})
    expected = torch.load(io.BytesIO(data), weights_only=True)
    found = safe_load(io.BytesIO(data))
    assert found["a"].tolist() == expected["a"].tolist() == [2, 3]
    assert found["b"].tolist() == expected["b"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("write", [zip_file, legacy_file])
@pytest.mark.parametrize(
    "other",
    [
        Reference(torch.IntStorage, "0", 4),  # the same bytes as other numbers
        Reference(torch.HalfStorage, "0", 8),
        Reference(torch.FloatStorage, "0", 3),
        Reference(torch.FloatStorage, "0", 5),
        Reference(torch.FloatStorage, "0", 1 << 40),
    ],
)
def test_a_storage_that_is_described_twice_differently(write, other):
    first = Reference(torch.FloatStorage, "0", 4)
    for one, two in ((first, other), (other, first)):
        content = [Tensor(one, 2), Tensor(two, 2)]
        with pytest.raises(UserError) as caught:
            safe_load(io.BytesIO(write(content, {"0": floats(1, 2, 3, 4)})))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [zip_file, legacy_file])
@pytest.mark.parametrize("view", [("1", 2, 2), ("0", 1, 3), (1, 2), "text", 7])
def test_views_of_storages_are_not_taken_for_the_whole(write, view):
    """Very old versions of torch wrote (key, offset, length); what is not refused is read right."""
    data = write([Tensor(Reference(torch.FloatStorage, "0", 4, view), 2)], {"0": floats(1, 2, 3, 4)})
    try:
        found = safe_load(io.BytesIO(data))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert write is legacy_file and isinstance(view, tuple) and len(view) == 3
        assert found[0].tolist() == [1.0 + view[1], 2.0 + view[1]]


def overlapping_zip(count: int, size: int) -> bytes:
    """A torch.save file whose ``count`` storages of about ``size`` bytes overlap."""
    # Keys of three digits make headers of 40 bytes, so that all storages begin at a whole float.
    keys = [f"{number:03d}" for number in range(count)]
    blob, entries, lengths = bytes(size), [], {}

    def header(name: bytes, data: bytes) -> bytes:
        sizes = struct.pack("<IIIHH", zlib.crc32(data), len(data), len(data), len(name), 0)
        return struct.pack("<4sHHHHH", b"PK\x03\x04", 20, 0, 0, 0, 33) + sizes + name

    def central(name: bytes, data: bytes, offset: int) -> bytes:
        sizes = struct.pack("<IIIHHH", zlib.crc32(data), len(data), len(data), len(name), 0, 0)
        return (
            struct.pack("<4sHHHHHH", b"PK\x01\x02", 20, 20, 0, 0, 0, 33)
            + sizes
            + struct.pack("<HHII", 0, 0, 0, offset)
            + name
        )

    for key in reversed(keys):
        lengths[key] = len(blob)
        entries.append((f"a/data/{key}".encode(), blob))
        blob = header(*entries[-1]) + blob
    content = [Tensor(Reference(torch.FloatStorage, key, lengths[key] // 4), 1) for key in keys]
    main = (b"a/data.pkl", pickled(content))
    body, listing = header(*main) + main[1], central(*main, 0)
    for number, (name, data) in enumerate(reversed(entries)):
        listing += central(name, data, len(body) + 40 * number)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count + 1, count + 1, len(listing), len(body + blob), 0)
    return body + blob + listing + end


def test_parts_of_an_archive_that_lie_within_each_other(tmp_path):
    """One of them is fine; all together are more than the file has."""
    assert len(safe_load(io.BytesIO(overlapping_zip(1, MIB)))) == 1
    path = tmp_path / "net.pt"
    path.write_bytes(overlapping_zip(60, MIB))
    assert path.stat().st_size < 2 * MIB
    for load in (safe_load, safe_load_checkpoint, lambda path: safe_load(io.BytesIO(path.read_bytes()))):
        with pytest.raises(UserError) as caught:
            load(path)
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# Images


def peak_of(work) -> int:
    """Bytes that Python allocates at most during a call."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packed = zlib.compress(rows, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_an_image_beyond_pillows_limit_is_refused_where_pillow_only_warns():
    side = int(Image.MAX_IMAGE_PIXELS**0.5) + 2
    assert Image.MAX_IMAGE_PIXELS < side * side < 2 * Image.MAX_IMAGE_PIXELS
    data = png(side, side, bytes((side + 1) * 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="^big.png: .*pixel"):
            decode_image(data, "big.png")
    assert decode_image(png(4, 2, bytes(5 * 2)), "small.png").shape == (1, 2, 4)


@pytest.mark.parametrize("claimed", [(1 << 28) - 1, 1 << 27])
def test_no_room_is_made_for_bytes_that_an_archive_does_not_have(tmp_path, claimed):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png(4, 2, bytes(5 * 2)))
    data = bytearray(path.read_bytes())
    for place in (20, 24):  # packed and unpacked size in the table of contents
        at = data.rfind(b"PK\x01\x02") + place
        data[at : at + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(data)

    def read():
        with pytest.raises(UserError, match="set.zip"):
            ImageSource(path).read(0)

    assert peak_of(read) < 4 * MIB
