"""Ways to damage a file: bytes, pickle instructions, JSON values, parts of zip archives.

``mutate(data, kind, random)`` returns other bytes; they depend on the state of ``random`` alone.
"""

import io
import json
import pickletools
import struct
import warnings
import zipfile

MARKER = "EXECUTED"  # a file that hostile pickles try to make
ODD_NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
DEEP = 3000
ODD_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 10**6, 1 << 40, 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "nan", "../../etc/passwd", "\0", "é" * 50, [], {}, [[]], [1, "x", None], {"x": {"y": []}}, [1] * 2000),
)


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


# Pieces of pickle: calls of dangerous things, and tricks with the stack and with what is allowed.
HOSTILE = (
    _global("os", "system") + b"(" + _text(f"touch {MARKER}") + b"tR",
    _global("posix", "system") + b"(" + _text(f"touch {MARKER}") + b"tR",
    _global("builtins", "exec") + b"(" + _text(f"open('{MARKER}','w')") + b"tR",
    _global("builtins", "eval") + b"(" + _text(f"open('{MARKER}','w')") + b"tR",
    _global("builtins", "getattr") + b"(" + _global("os", "path") + _text("os") + b"tR",
    _global("torch", "load") + b"(" + _text("other.pt") + b"tR",
    _global("torch.hub", "load") + b"(" + _text("a/b") + _text("c") + b"tR",
    _global("numpy", "load") + b"(" + _text("x.npy") + b"tR",
    _global("subprocess", "Popen") + b"(" + _text(f"touch {MARKER}") + b"tR",
    _global("torch_utils.safe_pickle", "safe_load") + b"(" + _text("x") + b"tR",
    _global("torch._utils", "_rebuild_tensor_v2.__globals__"),
    _global("collections", "OrderedDict") + b")R",
    _global("collections", "OrderedDict") + b"((" + _text("a") + b"K\x01tttR",
    _global("torch", "FloatStorage") + b")R",
    _global("torch.storage", "_load_from_bytes") + b"(" + b"C\x04abcdtR",
    _global("torch_utils.persistence", "_reconstruct_persistent_obj") + b"(}tR",
    f"(S'touch {MARKER}'\nios\nsystem\n".encode(),
    b"\x80\x05\x8c\x02os\x8c\x06system\x93",
    b"h\x00",  # what the memo has at 0
    b"}b",
    b"0",
    b"2",
    b"(",
    b"t",
    b"]a",
    b"K\x05Q",
    b"\x82\x01",
    b"r\xff\xff\xff\x7f",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\x8b\xff\xff\xff\x7f",
    b"(" * DEEP,
    b"]" + b"\x85" * DEEP,
    b"(" + b"l" * 50,
    b"I" + b"9" * 6000 + b"\n",
)


def mutate(data: bytes, kind: str, random) -> bytes:
    """kind: pickle, zip, json, safetensors or bytes. Some changes are of plain bytes always."""
    own = {"pickle": _pickle, "zip": _zip, "json": _json, "safetensors": _safetensors}.get(kind)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = own if own is not None and random.random() < 0.65 else _bytes
        data = change(data, random)
    return data


# --------------------------------------------------------------------------------------------------


def _bytes(data: bytes, random) -> bytes:
    if not data:
        return bytes(random.randrange(256) for _ in range(random.randrange(40)))
    # The structure of a file is at its ends more often than in the middle of its weights.
    reach = random.choice((64, 512, len(data), len(data)))
    near = min(random.randrange(max(1, min(reach, len(data)))), len(data) - 1)
    at = near if random.random() < 0.7 else len(data) - 1 - near
    length = random.choice((1, 2, 4, 8, random.randrange(1, 400)))
    change = random.randrange(7)
    if change == 0:
        return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    if change == 1:
        return data[:at] + bytes(random.randrange(256) for _ in range(length)) + data[at + length :]
    if change == 2:
        return data[:at]
    if change == 3:
        return data[:at] + data[at + length :]
    if change == 4:
        return data[:at] + data[at : at + length] * random.choice((2, 3, 40)) + data[at + length :]
    if change == 5:
        size = random.choice((1, 2, 4, 8))
        number = random.choice(ODD_NUMBERS) % (1 << 8 * size)
        return data[:at] + number.to_bytes(size, random.choice(("little", "big"))) + data[at + size :]
    return data[at:] + data[:at]


def _pickle(data: bytes, random) -> bytes:
    try:
        places = [place for _, _, place in pickletools.genops(data)]
    except Exception:  # it is damaged already: whatever pickletools says of that
        return _bytes(data, random)
    index = random.randrange(len(places))
    start, end = places[index], (places + [len(data)])[index + 1]
    change = random.randrange(6)
    if change <= 2:
        return data[:start] + random.choice(HOSTILE) + data[start:]
    if change == 3:
        return data[:start] + data[end:]
    if change == 4:
        return data[:start] + data[start:end] * random.choice((2, 3, 500)) + data[end:]
    other = random.randrange(len(places))
    piece = data[places[other] : (places + [len(data)])[other + 1]]
    return data[:start] + piece + data[end:]


def _change_value(value, random):
    """A JSON value with one of its parts replaced."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = random.choice(sorted(value))
        change = random.random()
        if change < 0.1:
            return {name: part for name, part in value.items() if name != key}
        if change < 0.2:
            return {**value, random.choice(("surprise", "__class__", "", "x" * 300)): random.choice(ODD_VALUES)}
        return {**value, key: _change_value(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.8:
        index = random.randrange(len(value))
        return [*value[:index], _change_value(value[index], random), *value[index + 1 :]]
    if isinstance(value, str) and value[:1] in "{[" and value and random.random() < 0.8:  # JSON inside JSON
        try:
            return json.dumps(_change_value(json.loads(value), random))
        except ValueError:
            return value[1:]
    return random.choice(ODD_VALUES)


def _json(data: bytes, random) -> bytes:
    if random.random() < 0.05:
        return b"[" * 100_000
    try:
        return json.dumps(_change_value(json.loads(data), random)).encode()
    except (ValueError, RecursionError):
        return _bytes(data, random)


def _safetensors(data: bytes, random) -> bytes:
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps(_change_value(json.loads(data[8 : 8 + length]), random)).encode()
    except (ValueError, RecursionError, OverflowError, struct.error):
        return _bytes(data, random)
    announced = len(header) if random.random() < 0.9 else random.choice(ODD_NUMBERS) % (1 << 64)
    return struct.pack("<Q", announced) + header + data[8 + length :]


def _zip(data: bytes, random) -> bytes:
    """An archive with one part changed, renamed, doubled, packed, a link, or declared larger."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # it is damaged already: whatever zipfile says of that
        return _bytes(data, random)
    if not parts:
        return _bytes(data, random)
    index = random.randrange(len(parts))
    name, content = parts[index]
    change = random.randrange(8)
    packing, link = zipfile.ZIP_STORED, False
    if change <= 2:
        kind = "json" if name.endswith(".json") else "pickle" if name.endswith(".pkl") else "bytes"
        content = mutate(content, kind, random)
    elif change == 3:
        name = random.choice(
            (f"../{MARKER}", f"/tmp/{MARKER}", "dataset.json", "C:\\x.png", name + "/", "a" * 70_000, "")
        )
    elif change == 4:
        packing = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        content = content + bytes(random.choice((0, 10**6, 10**7)))
    elif change == 5:
        link, content = True, b"/etc/passwd"
    elif change == 6:
        name, content = random.choice(parts)
    parts[index : index + (change != 6)] = [(name[:65_000], content)]
    if change == 7:
        del parts[index]
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", packing) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two parts of one name are meant
        for part, (filename, body) in enumerate(parts):
            info = zipfile.ZipInfo(filename)
            info.compress_type = packing
            if link and part == index:
                info.external_attr = 0o120777 << 16
            archive.writestr(info, body)
    packed = target.getvalue()
    if random.random() < 0.1:  # sizes in the directory that are not those of the parts
        at = packed.rfind(b"PK\x01\x02") + random.choice((16, 20, 24, 42))
        packed = packed[:at] + (random.choice(ODD_NUMBERS) % (1 << 32)).to_bytes(4, "little") + packed[at + 4 :]
    return packed
