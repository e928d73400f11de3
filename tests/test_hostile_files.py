"""Files made to harm: nothing of them is executed, and reading them takes bounded time and memory.

tests/test_safe_pickle.py has the structure of real files and single misuses; here are the tricks.
"""

import io
import json
import os
import pickle
import pickletools
import struct
import sys
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from fuzz_mutations import HOSTILE
from PIL import Image

from models.detectors import TRUSTED_TORCHSCRIPT, load_classifier, load_detector
from models.edm import load_edm_network
from tools.dataset_tool import ArraySource
from torch_utils import safe_pickle
from torch_utils.arrays import read_npz
from torch_utils.download import extract_member
from torch_utils.errors import UserError
from torch_utils.frechet import Reference
from torch_utils.image_data import ImageSource, decode_image, load_array
from torch_utils.safe_pickle import UnsafePickleError, safe_load, safe_load_checkpoint
from torch_utils.weights_file import read_weights
from training.checkpoint import load_predictor

ALLOWED = safe_pickle._OBJECT_GLOBALS | safe_pickle._STORAGE_GLOBALS


class Effects:
    """Audit events that mean that a file got something done."""

    events = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.")
    seen: list[str] = []


sys.addaudithook(lambda event, arguments: Effects.seen.append(event) if event.startswith(Effects.events) else None)


@pytest.fixture(autouse=True)
def nothing_happens(tmp_path, monkeypatch):
    """No test here may start a program, use the standard unpickler's names, open a connection or leave a file."""
    monkeypatch.chdir(tmp_path)
    Effects.seen.clear()
    yield
    assert Effects.seen == [] and not (tmp_path / "EXECUTED").exists()


def refuse(data, message=None, load=safe_load):
    with pytest.raises(UserError, match=message) as caught:
        load(io.BytesIO(data))
    assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# The allow-list


def test_the_list_has_exact_names_of_inert_things():
    """Nothing on it can be called by the unpickler but our own builders; none reaches an attribute by a dot."""
    for (module, name), value in ALLOWED.items():
        assert "." not in name and "*" not in module + name
        assert isinstance(value, (safe_pickle._Builder, safe_pickle._PlainModule, safe_pickle._StorageType, str))
        if isinstance(value, safe_pickle._Builder):
            assert value.function.__module__ == "torch_utils.safe_pickle"
    for dangerous in ("getattr", "eval", "exec", "partial", "attrgetter", "methodcaller", "load", "import_module"):
        assert dangerous not in {name for _, name in ALLOWED}


def global_of(module, name, protocol):
    if protocol == 0:
        return f"c{module}\n{name}\n.".encode()
    text = b"".join(b"X" + len(part.encode()).to_bytes(4, "little") + part.encode() for part in (module, name))
    return b"\x80" + bytes([protocol]) + text + b"\x93."


@pytest.mark.parametrize("protocol", [0, 4, 5])
def test_neighbours_of_allowed_names_are_refused(protocol):
    for module, name in ALLOWED:
        if (module, name) in safe_pickle._OBJECT_GLOBALS:  # the others are for archives of torch.save
            safe_load(io.BytesIO(global_of(module, name, protocol)))
        for other in (
            (module, name + ".__init__"),
            (module, name + "x"),
            (module, "__" + name),
            (module + ".x", name),
            (module, name.upper() + "_"),
            (module.partition(".")[0] + "_", name),
            ("", f"{module}.{name}"),
            (f"{module}.{name}", "__call__"),
        ):
            if other not in ALLOWED:
                refuse(global_of(*other, protocol), "not on the safe list")


@pytest.mark.parametrize("name", [b"]", b"}", b"K\x01", b"N", b"(t", b"]\x85"])
def test_names_that_are_no_text(name):
    refuse(b"\x80\x04" + name + b"\x8c\x06system\x93.")
    refuse(b"\x80\x04\x8c\x02os" + name + b"\x93.")


# ----------------------------------------------------------------------------------------------------------------------
# The machine


class Payload:
    def __reduce__(self):
        return os.system, ("touch EXECUTED",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol):
    plain = {"a": [1, -(1 << 70), 2.5, None, True, "é", (1, (2,)), b"\x00\xff", {3, 4}], "b": {"c": [[]]}}
    assert safe_load(io.BytesIO(pickle.dumps(plain, protocol))) == plain
    for hostile in (Payload(), [Payload()], {"ema": Payload()}):
        refuse(pickle.dumps(hostile, protocol), "system'")
        refuse(pickle.dumps(hostile, protocol), "system'", load_edm_network)
        refuse(pickle.dumps(hostile, protocol), "system'", load_predictor)


def test_later_protocols_and_instructions_for_outside_data_are_refused():
    refuse(b"\x80\x06N.", "unsupported pickle protocol")
    for code in (pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1 + b"\x01", pickle.EXT4 + bytes(4)):
        refuse(b"\x80\x05N" + code + b".", "instruction")
    refuse(b"Pname\n.", "instruction")  # a persistent id as text
    refuse(pickle.dumps(bytearray(b"x"), 5), "not on the safe list|instruction")


def test_instructions_are_the_known_ones():
    """What a new version of pickle brings is not taken over unseen."""
    known = {code.code.encode("latin1")[0] for code in pickletools.opcodes}
    assert set(safe_pickle._SafeUnpickler.dispatch) <= known
    own = {code for code, method in safe_pickle._SafeUnpickler.dispatch.items() if method.__module__ != "pickle"}
    acting = {pickle.REDUCE, pickle.BUILD, pickle.INST, pickle.NEWOBJ, pickle.SETITEM, pickle.SETITEMS, pickle.APPEND}
    assert {code[0] for code in acting | {pickle.APPENDS, pickle.ADDITEMS, pickle.DICT, pickle.FROZENSET}} == own
    for code in (pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID):
        assert code[0] not in safe_pickle._SafeUnpickler.dispatch


@pytest.mark.parametrize("piece", HOSTILE[:17], ids=range(17))
@pytest.mark.parametrize("load", [safe_load, load_edm_network, load_predictor])
def test_calls_of_what_does_not_belong(piece, load):
    for wrapped in (piece + b".", b"\x80\x02]" + piece + b"a.", b"(" + piece + b"N0K\x01l."):
        try:
            load(io.BytesIO(wrapped))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            pytest.fail("it was loaded") if load is not safe_load else None


def test_tricks_with_stack_and_memo():
    builder = b"ccollections\nOrderedDict\n"
    for body in (
        b"0",
        b"h\x05",
        b"j\xff\xff\xff\x7f",
        b"g99\n",
        b"t",
        b"2",
        b"1",
        b"(1",
        b"a",
        b"s",
        b"R",
        b"b",
        b"\x81",
        b"\x94",
    ):
        refuse(body + b".")
    # What the memo returns is the same record as before, and as inert.
    refuse(builder + b"q\x000h\x00}b.", "sets the state of")
    refuse(builder + b"q\x000]h\x00a0h\x00K\x01R.", "calls something")
    assert safe_load(io.BytesIO(builder + b"q\x000h\x00)R.")) == {}
    # An index into the memo takes no memory.
    assert safe_load(io.BytesIO(b"K\x07r\xff\xff\xff\x7f.")) == 7
    refuse(b"K\x01p-5\n.")  # negative
    # A dictionary cannot replace the record of an object, nor a class its instance.
    refuse(b"ctorch.nn.modules.activation\nSigmoid\n)\x81q\x00}X\x01\x00\x00\x00aK\x01sbh\x00}b.", "sets the state of")


# ----------------------------------------------------------------------------------------------------------------------
# Bombs


def doubled(count, start=b"K\x01", pair=b"\x86"):
    """A pickle of k pairs, each of the one before twice: 2^k leaves in a few bytes."""
    return start + b"".join(b"q\x00h\x00" + pair for _ in range(count))


@pytest.mark.parametrize("wrap", [b"%s", b"}X\x03\x00\x00\x00ema%ss", b"(%sN}l", b"}X\x05\x00\x00\x00modelq\x01%ss"])
def test_doubling_is_refused_at_once(wrap):
    started = time.process_time()  # of this process alone: the machine may be busy
    for load in (safe_load, load_edm_network, load_predictor):
        refuse(b"\x80\x02" + wrap.replace(b"%s", doubled(60)) + b".", "nested or shared without end", load)
    assert time.process_time() - started < 5


def test_doubling_within_an_object_is_refused():
    module = b"ctorch.nn.modules.activation\nSigmoid\n)\x81}X\x01\x00\x00\x00a" + doubled(60) + b"sb."
    refuse(b"\x80\x02" + module, "nested or shared without end")


def test_containers_in_themselves_and_deep_ones():
    for body in (b"]q\x00h\x00a.", b"}q\x00X\x01\x00\x00\x00ah\x00s.", b"]q\x00(h\x00ta."):
        refuse(b"\x80\x02" + body, "holds itself")
    refuse(b"]" + b"\x85" * 5000 + b".", "nested or shared")
    refuse(b"(" * 100_000 + b".")
    refuse(b"(" * 100_000 + b"t" * 99_999 + b".", "nested or shared")
    assert safe_load(io.BytesIO(b"]" + b"\x85" * 100 + b".")) is not None
    shared = [1, 2, 3]
    assert safe_load(io.BytesIO(pickle.dumps({"a": [shared, shared], "b": shared}))) == {
        "a": [shared, shared],
        "b": shared,
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_announced_lengths_are_not_believed(protocol):
    for code, width in ((b"B", 4), (b"X", 4), (b"T", 4), (b"\x8b", 4), (b"\x8e", 8), (b"\x8d", 8), (b"\x95", 8)):
        for count in (1 << 20, (1 << 31) - 1, (1 << 8 * width) - 1):
            refuse(b"\x80" + bytes([protocol]) + code + count.to_bytes(width, "little") + b"x.")
    refuse(b"I" + b"9" * 100_000 + b"\n.")  # a number whose conversion would take quadratic time
    refuse(b"L" + b"9" * 100_000 + b"L\n.")


def test_nested_storages_know_only_storages():
    """A storage inside a storage, an object inside a storage, and one whose bytes are a torch.save archive."""
    storage = b"ctorch.storage\n_load_from_bytes\n"

    def nest(data):
        return storage + b"(B" + len(data).to_bytes(4, "little") + data + b"tR"

    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    inner = head + b"\x80\x02" + nest(b"x") + b"."
    for data, message in (
        (b"", "ends early|EOF"),
        (buffer.getvalue(), None),
        (inner, "_load_from_bytes"),
        (head + pickle.dumps(Payload(), 2), "system"),
        (head + pickle.dumps({"a": 1}, 2) + pickle.dumps([], 2), "something else"),
        (pickle.dumps(Payload(), 2), "system"),
    ):
        refuse(b"\x80\x02" + nest(data) + b".", message)


# ----------------------------------------------------------------------------------------------------------------------
# Archives of torch.save


def archive_of(parts, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def state_dict_archive(numel=3, key="0", extra=()):
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX" + len(key).to_bytes(4, "little") + key.encode()
    storage += b"X\x03\x00\x00\x00cpu" + pickle.dumps(numel, 2)[2:-1] + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x03\x85K\x01\x85\x89Nt" + b"R"
    data = {"archive/data.pkl": b"\x80\x02}X\x01\x00\x00\x00a" + tensor + b"s.", "archive/data/0": bytes(12)}
    return data | dict(extra)


def test_archives_whose_parts_lie_about_themselves(tmp_path):
    good = archive_of(state_dict_archive())
    assert safe_load(io.BytesIO(good))["a"].shape == (3,)
    for numel in (2, 4, 1 << 40, -1):
        refuse(archive_of(state_dict_archive(numel)))
    for key in ("../../../etc/passwd", "/etc/passwd", "1", "0/../0", ""):
        refuse(archive_of(state_dict_archive(key=key)), "is missing|part")
    refuse(archive_of(state_dict_archive(extra={"other/data.pkl": b"N."})), "not one written by torch.save")
    refuse(archive_of(state_dict_archive(), compression=zipfile.ZIP_DEFLATED), "compressed")
    # Sizes, and places, of the directory that are not those of the parts.
    at = good.rfind(b"PK\x01\x02", 0, good.rfind(b"PK\x01\x02"))
    for where, value in ((20, 1 << 30), (24, 1 << 30), (42, 1 << 31), (42, 7)):
        lying = bytearray(good)
        lying[at + where : at + where + 4] = value.to_bytes(4, "little")
        for load in (safe_load, safe_load_checkpoint):
            refuse(bytes(lying), None, load)
        (tmp_path / "lying.pt").write_bytes(lying)
        with pytest.raises(UserError):
            read_weights(tmp_path / "lying.pt")


def test_weights_with_foreign_objects_stay_inert(tmp_path):
    class Foreign:
        def __reduce__(self):
            return os.system, ("touch EXECUTED",), {"a": 1}, iter([1]), iter([("b", 2)])

    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": Foreign()}, tmp_path / "lightning.ckpt")
    assert torch.equal(read_weights(tmp_path / "lightning.ckpt")["w"], torch.ones(2))
    torch.save({"w": Foreign()}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="of the class"):
        read_weights(tmp_path / "bad.ckpt")


# ----------------------------------------------------------------------------------------------------------------------
# Arrays


def npy(header, data=b""):
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    "header, data",
    [
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}", bytes(8)),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000, 1000000)}", bytes(8)),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}", bytes(8)),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (0, 99999999999999999999)}", b""),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", pickle.dumps(Payload())),
        ("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,)}", pickle.dumps(Payload())),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': __import__('os').system('touch EXECUTED')}", bytes(8)),
        ("(" * 9000, b""),
        ("{'descr': '|V0', 'fortran_order': False, 'shape': (5,)}", b""),
        ("{'descr': '<U1', 'fortran_order': False, 'shape': (1,)}", b"\xff\xff\xff\xff"),
    ],
)
def test_npz_that_lies_or_carries_objects(header, data, tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        parts = {f"{name}.npy": npy(header, data) for name in ("mu", "sigma", "images")}
        (tmp_path / "x.npz").write_bytes(archive_of(parts, compression=compression))
        for load in (Reference.load, ArraySource):
            with pytest.raises(UserError, match="x.npz"):
                load(tmp_path / "x.npz")


def test_npz_bombs_and_ordinary_files(tmp_path):
    path = tmp_path / "x.npz"
    arrays = {
        "a": np.arange(6).reshape(2, 3),
        "f": np.asfortranarray(np.ones((2, 3))),
        "s": np.array("text"),
        "e": np.ones((0, 2)),
    }
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays)
        read = read_npz(path)
        assert list(read) == list(arrays)
        for name, value in arrays.items():
            np.testing.assert_array_equal(read[name], value)
            assert read[name].dtype == value.dtype and read[name].flags.writeable
    np.savez_compressed(path, mu=np.zeros(1 << 20), sigma=np.zeros(1))  # 8 MiB of zeros in a few KB
    with pytest.raises(UserError, match="unpacks to"):
        read_npz(path, most_bytes=1 << 20)
    np.savez(path, mu=np.array([{"a": 1}], dtype=object), sigma=np.ones(1))
    with pytest.raises(UserError, match="never loaded"):
        Reference.load(path)


# ----------------------------------------------------------------------------------------------------------------------
# Images


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def test_png_bombs():
    packed = zlib.compress(bytes(1 << 20))
    for size in ((50_000, 50_000), (1 << 31, 1), ((1 << 32) - 1, (1 << 32) - 1), (0, 5)):
        with pytest.raises(UserError, match="bomb.png"):
            decode_image(png(*size, chunk(b"IDAT", packed)), "bomb.png")
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 28)))  # 256 MiB of text in 260 KB
    with pytest.raises(UserError, match="bomb.png"):
        decode_image(png(4, 4, text, chunk(b"IDAT", zlib.compress(bytes(20)))), "bomb.png")
    with pytest.raises(UserError, match="bomb.png"):
        decode_image(png(4, 4, chunk(b"IDAT", packed[:10])), "bomb.png")


def test_formats_that_start_programs_or_unpack_without_limit_are_not_tried():
    """Neither under their own names nor under others; and the rarer ones only under their own."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    fits = b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800)
    xbm = b"#define a_width 1\n#define a_height 1\nstatic char a_bits[] = {\n0x00};\n"
    assert decode_image(xbm, "x.xbm").shape == (1, 1, 1)
    for name in ("x.png", "x.eps", "x.fits", "x.wmf", "x"):
        for data in (eps, fits, b"\xd7\xcd\xc6\x9a" + bytes(60), b"<svg/>", xbm):
            with pytest.raises(UserError, match="not a readable image"):
                decode_image(data, name)


def picture():
    buffer = io.BytesIO()
    Image.new("L", (4, 4), 7).save(buffer, "png")
    return buffer.getvalue()


def test_zip_datasets_are_read_in_place(tmp_path):
    """Names that lead out of the archive are names only; links are not followed; nothing is unpacked to the disk."""
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../../EXECUTED.png", "/EXECUTED.png", "C:\\EXECUTED.png", "a/../../b.png"):
            archive.writestr(name, picture())
    assert load_array(path).shape == (4, 1, 4, 4)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "set.zip"]
    (tmp_path / "secret.png").write_bytes(picture())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, str(tmp_path / "secret.png"))
    with pytest.raises(UserError, match="holds no image; 1 file ignored: 1 links"):
        load_array(path)


def test_oversized_and_lying_entries(tmp_path):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes((1 << 28) + 1))
    with pytest.raises(UserError, match="unpacks to"):
        ImageSource(path).read(0)
    for place, size in ((24, 10), (20, 10), (20, 1 << 31), (42, 1 << 31), (42, 3)):
        data = bytearray(archive_of({"a.png": picture()}))
        at = data.rfind(b"PK\x01\x02") + place
        data[at : at + 4] = size.to_bytes(4, "little")
        path.write_bytes(data)
        try:
            read = ImageSource(path).read(0)
        except UserError as error:
            assert "set.zip" in str(error)
        else:  # a size that is only announced, and never believed
            assert (read == 7).all() and read.shape == (1, 4, 4)


@pytest.mark.parametrize(
    "labels",
    [
        b"[" * 200_000,
        b'{"labels": ' * 50_000,
        b'{"labels": [["a.png", 1e999]]}',
        b'{"labels": [["a.png", ' + b"9" * 9999 + b"]]}",
    ]
    + [
        b'{"labels": 5}',
        b'{"labels": [1]}',
        b'{"labels": {"a.png": 1}}',
        b"\xff\xfe",
        b"",
        b'{"labels": [[["a"], 1]]}',
    ],
)
def test_label_files(labels, tmp_path):
    (tmp_path / "set.zip").write_bytes(archive_of({"a.png": picture(), "dataset.json": labels}))
    with pytest.raises(UserError, match="dataset.json"):
        ImageSource(tmp_path / "set.zip")


def test_downloaded_archives_give_one_plain_file(tmp_path):
    """``extract_member`` writes where it is told, whatever the archive says."""
    (tmp_path / "a.zip").write_bytes(
        archive_of({"../model.ckpt": b"x", "model.ckpt": b"y", "sub/../../EXECUTED": b"z"})
    )
    extract_member(tmp_path / "a.zip", "model.ckpt", tmp_path / "out" / "model.ckpt")
    assert (tmp_path / "out" / "model.ckpt").read_bytes() == b"y"
    link = zipfile.ZipInfo("model.ckpt")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="no single file"):
        extract_member(tmp_path / "b.zip", "model.ckpt", tmp_path / "out" / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.zip", "out"]


# ----------------------------------------------------------------------------------------------------------------------
# Programs


class Harmless(torch.nn.Module):
    def forward(self, x):
        return x.float().flatten(1)[:, :4]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_runs_only_when_known_or_trusted(tmp_path, monkeypatch):
    path = tmp_path / "net.pt"
    torch.jit.script(Harmless()).save(str(path))
    loaded = []
    original = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda *args, **more: loaded.append(args) or original(*args, **more))
    with pytest.raises(UserError, match="unknown TorchScript file.*--trust=True"):
        load_detector(path)
    assert loaded == []
    assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in TRUSTED_TORCHSCRIPT)
    assert load_detector(path, trust=True).feature_dim == 4 and len(loaded) == 1
    for other in ("net.pkl", "net.bin", "net"):
        (tmp_path / other).write_bytes(path.read_bytes())
        with pytest.raises(UserError, match="expected TorchScript"):
            load_detector(tmp_path / other, trust=True)


def test_a_file_under_the_name_of_inception_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("AMED_CACHE", str(tmp_path))
    torch.save({"a": 1}, tmp_path / "inception-2015-12-05.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("it was run"))
    with pytest.raises(UserError, match="does not have the SHA-256"):
        load_detector("inception")


def test_classifiers_of_absurd_sizes(tmp_path):
    from safetensors.torch import save_file

    for config in (
        {"width": 1 << 40},
        {"width": -1},
        {"img_channels": "x"},
        {"num_classes": 1 << 19},
        {"more": 1},
        [1],
        {},
    ):
        full = {"img_channels": 1, "img_resolution": 32, "num_classes": 10} | (
            config if isinstance(config, dict) else {}
        )
        text = json.dumps(full if config else config)
        save_file({"a": torch.ones(1)}, tmp_path / "c.safetensors", {"format": "amed-classifier-1", "config": text})
        with pytest.raises(UserError, match="c.safetensors"):
            load_classifier(tmp_path / "c.safetensors")


def test_unsafe_errors_are_both_ours_and_pickles():
    assert issubclass(UnsafePickleError, UserError) and issubclass(UnsafePickleError, pickle.UnpicklingError)
