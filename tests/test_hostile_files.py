"""Files made to harm: nothing of them is executed, and reading them takes bounded time and memory.

tests/test_safe_pickle.py has the structure of real files and single misuses; here are the tricks.
"""

import contextlib
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

import click
import click.testing
import numpy as np
import pytest
import torch
from fuzz_mutations import HOSTILE
from PIL import Image

from evaluation.detectors import TRUSTED_TORCHSCRIPT, load_classifier, load_detector
from evaluation.frechet import Reference
from evaluation.inception import load_inception
from models import build_denoiser
from models.edm import load_edm_network
from models.zoo import read_sidecar
from solvers.schedule_file import load_schedule
from solvers.span_table import SpanSolver
from tools.dataset_tool import ArraySource
from tools.train_denoiser import read_state
from torch_utils import safe_pickle
from torch_utils.arrays import read_npz
from torch_utils.cli import Command
from torch_utils.download import extract_member
from torch_utils.errors import UserError, parse_json
from torch_utils.images import ImageSource, decode_image, load_array
from torch_utils.safe_pickle import UnsafePickleError, safe_load, safe_load_checkpoint
from torch_utils.tensor_file import read_safetensors, read_weights, write_safetensors
from torch_utils.zip_file import BadMember, read_member
from training.checkpoint import load_predictor, save_predictor
from training.predictor import AMEDPredictor
from training.run_folder import load_newest_state, stored_options

ALLOWED = safe_pickle._OBJECT_GLOBALS | safe_pickle._STORAGE_GLOBALS


class Effects:
    """Audit events that mean that a file got something done."""

    events = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.")
    seen: list[str] = []


sys.addaudithook(lambda event, arguments: Effects.seen.append(event) if event.startswith(Effects.events) else None)


@pytest.fixture(autouse=True)
def nothing_happens(tmp_path, monkeypatch):
    """Fails if a test starts a program, unpickles a name, opens a connection or leaves a file."""
    monkeypatch.chdir(tmp_path)
    Effects.seen.clear()
    yield
    assert Effects.seen == [] and not (tmp_path / "EXECUTED").exists()


def refuse(data, message=None, load=safe_load):
    with pytest.raises(UserError, match=message) as caught:
        load(io.BytesIO(data))
    assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------
# The allow-list


def test_the_list_has_exact_names_of_inert_things():
    """The unpickler can call only our own builders, and a dotted name reaches no attribute."""
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


# --------------------------------------------------------------------------------------------------
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
    """New pickle instructions are not accepted unseen; calls go through the allow-list."""
    own = safe_pickle._Machine.dispatch
    refused = {opcode.name for opcode in pickletools.opcodes if ord(opcode.code) not in own}
    assert refused == {"OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"}
    assert not set(own.values()) & set(pickle._Unpickler.dispatch.values())
    for name in ("reduce", "newobj", "newobj_ex", "build", "global", "stack_global", "inst", "binpersid"):
        assert f"load_{name}" in vars(safe_pickle._Machine)
    assert "find_class" in vars(safe_pickle._Machine)


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


# --------------------------------------------------------------------------------------------------
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
    """A storage or an object inside a storage, and one whose bytes are a torch.save archive."""
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


# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
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
    np.savez_compressed(path, mu=np.zeros(1 << 24), sigma=np.zeros(1))  # 128 MiB of zeros in a few KB
    with pytest.raises(UserError, match="unpacks to"):
        read_npz(path)
    np.savez(path, mu=np.array([{"a": 1}], dtype=object), sigma=np.ones(1))
    with pytest.raises(UserError, match="never loaded"):
        Reference.load(path)


# --------------------------------------------------------------------------------------------------
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
    """Names that lead out are names only, links are not followed, nothing is unpacked to disk."""
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


# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
# What a few bytes may cost: every kind is refused for one reason, at once

SPACE = 1 << 20


@contextlib.contextmanager
def at_once(seconds=4.0):
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


def number(value, width=16):
    return b"\x8a" + bytes([width]) + value.to_bytes(width, "little", signed=True)


def long_bytes(data):
    return b"B" + len(data).to_bytes(4, "little") + data


def text(value):
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


EQUAL_HASHES = (1 << 61) - 1  # whole numbers that differ by multiples of this have one hash


@pytest.mark.parametrize("load", [safe_load, load_edm_network, load_predictor])
def test_keys_with_one_hash(load):
    keys = [(i + 1) * EQUAL_HASHES for i in range(20_000)]
    with at_once():
        refuse(b"}(" + b"".join(number(key) + b"N" for key in keys) + b"u.", "too many keys", load)
        refuse(b"\x8f(" + b"".join(map(number, keys)) + b"\x90.", "too many keys", load)
        refuse(b"(" + b"".join(map(number, keys)) + b"\x91.", "too many keys", load)
        refuse(b"N" + b"".join(b"p%d\n" % key for key in keys) + b".", None, load)


def test_ordinary_keys_are_no_matter():
    content = {"ints": dict.fromkeys(range(50_000), 1), "few": {0.5: 1, 1 << 70: 2, None: 3, True: 4}}
    assert safe_load(io.BytesIO(pickle.dumps(content))) == content


def test_many_references_to_one_list():
    """n references to a list of m things are n * m things to print, and take n + m to refuse."""
    for n, m in ((20_000, 20_000), (200_000, 5_000)):
        with at_once():
            refuse(b"](" + b"N" * m + b"eq\x000](" + b"h\x00" * n + b"e.", "shared without end")
    assert len(safe_load(io.BytesIO(b"](" + b"N" * 100 + b"eq\x000](" + b"h\x00" * 1000 + b"e."))) == 1000
    large = b"]" + text("x" * SPACE) + b"q\x000](" + b"h\x00" * 1000 + b"e."  # 1 GiB to print
    with at_once():
        refuse(large, "shared without end")


def test_copies_are_paid_for_before_they_are_made():
    pairs = b"](" + b"".join(b"K" + bytes([i % 256]) + b"N\x86" for i in range(1000)) + b"eq\x000"
    ordered = b"ccollections\nOrderedDict\nq\x010"
    with at_once():
        refuse(ordered + pairs + b"](" + b"h\x01h\x00\x85R" * 40_000 + b"e.", "too many parts")
    for call in (b"c_codecs\nencode\n" + text("x" * SPACE) + text("latin1") + b"\x86",):
        stream = call + b"q\x000c_codecs\nencode\nq\x010](" + b"h\x01h\x00R" * 2000 + b"e."
        with at_once():
            refuse(stream, "unpack to far more")
    system = {"protocol_version": 1001, "little_endian": True}
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, system))
    pid = b"(" + text("storage") + b"ctorch\nByteStorage\n" + text("0") + text("cpu") + number(SPACE) + b"NtQ."
    storage = head + b"\x80\x02" + pid + pickle.dumps(["0"], 2) + SPACE.to_bytes(8, "little") + bytes(SPACE)
    stream = long_bytes(storage) + b"q\x000ctorch.storage\n_load_from_bytes\nq\x010]("
    with at_once():
        refuse(stream + b"h\x01h\x00\x85R" * 500 + b"e.", "unpack to far more")
    assert len(safe_load(io.BytesIO(stream + b"h\x01h\x00\x85R" + b"e."))) == 1


def test_numbers_of_too_many_digits():
    huge = b"\x8b" + (5000).to_bytes(4, "little") + b"\x11" * 5000  # 12,000 digits, which Python refuses to print
    for body in (huge, b"}" + huge + b"Ns", b"}" + text("ema") + huge + b"s"):
        for load in (safe_load, load_edm_network, load_predictor):
            refuse(b"\x80\x02" + body + b".", "too many digits", load)


def module_of(state: bytes) -> bytes:
    meta = b"}(" + text("type") + text("class") + text("version") + b"K\x06" + text("class_name") + text("EDMPrecond")
    return b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n" + meta + text("state") + state + b"u\x85R"


def test_names_of_megabytes():
    leaf = module_of(b"}(" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + b"}u")
    for _ in range(25):
        inner = b"}" + text("m" * 50_000) + leaf + b"s"
        leaf = module_of(b"}(" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + inner + b"u")
    refuse(leaf.join((b"}" + text("ema"), b"s.")), None, load_edm_network)
    names = {f"{i}{'n' * 5000}": torch.ones(1) for i in range(3)}
    record = safe_pickle.PersistentObject("Net", {"_parameters": names, "_buffers": {}, "_modules": {}})
    with pytest.raises(UserError, match="damaged at") as caught:
        record.state_dict()
    assert len(str(caught.value)) < 400


def test_entries_that_objects_share_are_counted():
    """10,000 modules that share one dictionary of 1,000 empty entries."""
    empty = {"_parameters": dict.fromkeys(map(str, range(1000))), "_buffers": {}, "_modules": {}}
    leaves = {str(i): safe_pickle.PersistentObject("Leaf", empty) for i in range(10_000)}
    record = safe_pickle.PersistentObject("Net", {"_parameters": {}, "_buffers": {}, "_modules": leaves})
    with at_once(), pytest.raises(UserError, match="Net is damaged: it has too many parts"):
        record.state_dict()


def test_many_names_of_one_tensor(tmp_path):
    """Copies of them, in float32, would take a thousand times the file."""
    one = torch.zeros(SPACE, dtype=torch.uint8)
    for name, content in (
        ("names.pt", {f"w{i}": one for i in range(1000)}),
        ("views.pt", {f"w{i}": one[1:] for i in range(1000)}),
    ):
        torch.save(content, tmp_path / name)
        with at_once(), pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)
    torch.save({"tied": one, "head": one}, tmp_path / "tied.pt")
    assert len(read_weights(tmp_path / "tied.pt")) == 2


# Archives


def packed(parts, method, announced=None):
    """A zip archive; announced: the unpacked size that its directory states, true or not."""
    data = bytearray(archive_of(parts, compression=method))
    if announced is not None:
        at = data.find(b"PK\x01\x02")
        while at >= 0:
            data[at + 24 : at + 28] = announced.to_bytes(4, "little")
            at = data.find(b"PK\x01\x02", at + 4)
    return bytes(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_without_a_limit_are_refused(method, tmp_path):
    """zipfile unpacks these whole, whatever size they announce: 1.6 KB can hold 4 GiB."""
    zeros = npy("{'descr': '<f8', 'fortran_order': False, 'shape': (9,)}", bytes(72))
    for announced in (None, 200):
        path = tmp_path / "x.npz"
        path.write_bytes(packed({f"{key}.npy": zeros for key in ("mu", "sigma", "images")}, method, announced))
        for load in (Reference.load, ArraySource, read_npz):
            with pytest.raises(UserError, match="x.npz.*only stored and deflated"):
                load(path)
        (tmp_path / "x.zip").write_bytes(packed({"model.ckpt": bytes(100)}, method, announced))
        with pytest.raises(UserError, match="only stored and deflated"):
            extract_member(tmp_path / "x.zip", "model.ckpt", tmp_path / "model.ckpt")
        path = tmp_path / "x.pt"
        path.write_bytes(packed(state_dict_archive(), method, announced))
        for load in (safe_load, safe_load_checkpoint, read_weights, load_inception, load_predictor, load_edm_network):
            with pytest.raises(UserError, match="x.pt.*is compressed"):
                load(path)


def test_deflated_parts_are_no_larger_than_they_say(tmp_path):
    many = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1048576,)}", bytes(SPACE))
    (tmp_path / "x.npz").write_bytes(packed({"mu.npy": many, "sigma.npy": many}, zipfile.ZIP_DEFLATED, 200))
    with pytest.raises(UserError, match="x.npz"):
        Reference.load(tmp_path / "x.npz")
    data = packed({"a": bytes(10)}, zipfile.ZIP_STORED, 1 << 30)
    with zipfile.ZipFile(io.BytesIO(data)) as archive, pytest.raises(BadMember, match="more than the file holds"):
        read_member(archive, archive.infolist()[0], 1 << 40)
    with zipfile.ZipFile(io.BytesIO(archive_of({"a": bytes(10)}))) as archive:
        assert read_member(archive, archive.infolist()[0], 10) == bytes(10)
        with pytest.raises(BadMember, match="more than the 9"):
            read_member(archive, archive.infolist()[0], 9)


def test_statistics_whose_texts_are_endless(tmp_path):
    for text_of in ("x" * 5000, np.array("\0" * (1 << 25))):
        np.savez_compressed(tmp_path / "x.npz", mu=np.zeros(2), sigma=np.eye(2), detector=text_of)
        with pytest.raises(UserError, match="x.npz: .*(is not a name|unpacks to)"):
            Reference.load(tmp_path / "x.npz")


def load_newest(path):
    return load_newest_state(path.parent)


STATE_LOADERS = (load_inception, read_state, load_newest)


def test_deflated_files_of_torch_save(tmp_path):
    path = tmp_path / "training-state-000001.pt"
    parts = state_dict_archive(numel=SPACE) | {"archive/data/0": bytes(4 * SPACE)}
    path.write_bytes(archive_of(parts, compression=zipfile.ZIP_DEFLATED))
    for load in (safe_load, read_weights, *STATE_LOADERS):
        with pytest.raises(UserError, match="compressed"):
            load(path)


def test_the_checksum_of_weights_is_compared(tmp_path):
    """Also where the file is memory-mapped: a flipped bit of a weight is found nowhere else."""
    path = tmp_path / "training-state-000001.pt"
    torch.save({"a": torch.arange(1000.0)}, path)
    assert read_weights(path)["a"][7] == 7
    data = bytearray(path.read_bytes())
    at = data.find(struct.pack("<f", 777.0))
    data[at] ^= 1
    path.write_bytes(data)
    for load in (safe_load, safe_load_checkpoint, read_weights, *STATE_LOADERS):
        with pytest.raises(UserError, match="CRC-32"):
            load(path)


def test_two_headers_of_a_part_that_differ(tmp_path):
    data = archive_of(state_dict_archive())
    at = data.find(b"archive/data/0")
    (tmp_path / "x.pt").write_bytes(data[:at] + b"archive/data/1" + data[at + 14 :])
    for load in (safe_load, safe_load_checkpoint, read_weights):
        with pytest.raises(UserError, match="x.pt"):
            load(tmp_path / "x.pt")


# Configurations


def edm_file(path, count=400, **config):
    from safetensors.torch import save_file

    full = {"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet", "model_channels": 4, **config}
    tensors = {f"p{i}": torch.ones(1) for i in range(count)}
    save_file(tensors, path, {"family": "edm", "config": json.dumps(full)})


@pytest.mark.parametrize(
    "config",
    [
        {"channel_mult": [1] * 300, "num_blocks": 300},
        {"channel_mult": [1] * 30, "num_blocks": 300},
        {"channel_mult": [1], "num_blocks": 1 << 19},
        {"channel_mult": [[1]], "model_channels": 1 << 40},
        {"channel_mult": "a" * 5, "model_channels": 1 << 40},
        {"channel_mult": [1], "num_blocks": 1, "resample_filter": [1] * 20_000},
        {"attn_resolutions": list(range(100_000))},
        {"dropout": "9" * 100_000},
    ],
)
@pytest.mark.parametrize("family", [False, True])
def test_networks_of_products(config, family, tmp_path):
    path = tmp_path / "net.safetensors"
    with at_once(5), pytest.raises(UserError) as caught:
        if family:
            full = {"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet", "model_channels": 4}
            build_denoiser("edm", full | config, {})
        else:
            edm_file(path, **config)
            load_edm_network(path)
    assert len(str(caught.value)) < 1000


def test_other_families_of_products():
    for family, config in (
        (
            "adm",
            {"model": {"image_size": 64, "num_channels": 32, "num_res_blocks": 200, "channel_mult": "1," * 30 + "1"}},
        ),
        ("cm", {"num_res_blocks": 1 << 19, "channel_mult": "1,1", "image_size": 64, "num_channels": 32}),
        ("ldm", {"timesteps": 1 << 40}),
        ("sd", {"num_res_blocks": 1 << 40}),
    ):
        with at_once(6), pytest.raises(UserError):
            build_denoiser(family, config, {})


def test_weights_are_compared_before_they_are_converted(monkeypatch, tmp_path):
    edm_file(tmp_path / "net.safetensors", channel_mult=[1], num_blocks=1)
    monkeypatch.setattr(torch.Tensor, "to", lambda *_, **__: pytest.fail("a weight was converted"))
    with pytest.raises(UserError, match="do not fit the network"):
        load_edm_network(tmp_path / "net.safetensors")


def change_config(path, **changes):
    """The same file with other settings in its metadata."""
    tensors, metadata = read_safetensors(path.read_bytes(), str(path))
    config = json.loads(metadata["config"]) | changes
    write_safetensors(path, tensors, metadata | {"config": json.dumps(config)})


SPAN = [
    *(
        {name: value}
        for name in ("num_steps", "parallel", "window", "max_order")
        for value in (2000, 1 << 40, "x", [1])
    ),
    *({"learn": value} for value in ({"knots": 1}, 5, [5], "knots", ["knots"] * 3 + ["x"])),
    *({"heads": value} for value in (5, {"time": 1}, [["time"]], "time")),
    *({"image_shape": value} for value in ([1 << 20] * 3, "abc", 5, [-1])),
    *(
        {"img_channels": 1 << 20, "heads": ["spatial"]},
        {"embedding_width": 1 << 30, "heads": ["time"]},
        {"embedding_width": 1 << 30, "heads": ["blocks"]},
    ),
    *({"sigmas": value} for value in ([1.0] * 5000, "x", [10**40, 1], {"a": 1})),
    *({name: value} for name in ("sigma_min", "schedule_rho", "sigma_scale_bound") for value in ("1", [1], True)),
]


@pytest.mark.parametrize("changes", SPAN, ids=str)
def test_settings_of_span_files(changes, tmp_path):
    path = tmp_path / "student.safetensors"
    save_predictor(SpanSolver(num_steps=4), path)
    change_config(path, **changes)
    with at_once(), pytest.raises(UserError, match="student.safetensors"):
        load_predictor(path)


def test_span_files_with_many_time_steps(tmp_path):
    """Whatever the sigmas are: 2,000 steps are too many, 16 calls per interval for 999 too."""
    path = tmp_path / "student.safetensors"
    for steps, parallel in ((2000, 1), (999, 16)):
        save_predictor(SpanSolver(num_steps=4), path)
        tensors, metadata = read_safetensors(path.read_bytes(), str(path))
        config = json.loads(metadata["config"]) | {"num_steps": steps, "parallel": parallel}
        tensors["knots"] = torch.zeros(steps - 1, dtype=torch.float64)
        write_safetensors(path, tensors, metadata | {"config": json.dumps(config)})
        with at_once(), pytest.raises(UserError, match="at most 1000"):
            load_predictor(path)


@pytest.mark.parametrize("changes", [{"num_steps": 20_000}, {"M": 20_000}, {"sigmas": list(range(20_000, 0, -1))}])
def test_predictors_of_many_time_steps(changes, tmp_path):
    path = tmp_path / "predictor.safetensors"
    save_predictor(AMEDPredictor(num_steps=4), path)
    change_config(path, **changes)
    with pytest.raises(UserError, match="at most 1000"):
        load_predictor(path)


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "1" + "0" * 400, "-" + "9" * 4301, "[" * 100_000, "[" * 500 + "]" * 500, '{"a":' * 300],
    ids=range(6),
)
def test_json_beyond_measure(value, tmp_path):
    """Numbers beyond Python's printing or float64, and depth, in every JSON that is read."""
    with pytest.raises(ValueError):
        parse_json(value)
    path = tmp_path / "net.pkl"
    (tmp_path / "net.pkl.json").write_text(f'{{"family": "edm", "config": {{"img_resolution": {value}}}}}')
    with pytest.raises(UserError, match="net.pkl.json"):
        read_sidecar(path)
    (tmp_path / "schedule.json").write_text(f'{{"format": "amed-schedule-1", "sigmas": {value}}}')
    with pytest.raises(UserError, match="schedule.json"):
        load_schedule(tmp_path / "schedule.json")
    (tmp_path / "training_options.json").write_text(f'{{"seed": {value}}}')
    with pytest.raises(UserError, match="training_options.json"):
        stored_options(tmp_path)
    save_predictor(AMEDPredictor(num_steps=4), tmp_path / "p.safetensors")
    tensors, metadata = read_safetensors((tmp_path / "p.safetensors").read_bytes(), "p")
    write_safetensors(tmp_path / "p.safetensors", tensors, metadata | {"config": f'{{"num_steps": {value}}}'})
    with pytest.raises(UserError, match="p.safetensors"):
        load_predictor(tmp_path / "p.safetensors")


def test_json_of_many_values():
    assert parse_json("[" + "1," * 100_000 + "1]")[-1] == 1
    with at_once(), pytest.raises(ValueError, match="more than"):
        parse_json(b"[" + b"[]," * 9_000_000 + b"[]]")


# What is printed

STEERING = "\x1b]0;title\x07\x1b[2J\x1b[31mred\u202egnp.exe\u2066\r\x00\x9b2J\ud800"


def test_nothing_of_a_file_steers_the_terminal(tmp_path):
    """Error messages, and what any program prints on either stream."""
    refuse(b"c" + b"os\x1b[2J\nsystem\x1b[31m\n.", r"os\\x1b\[2J.system")
    error = UserError(f"line\n {STEERING}")
    assert error.message.isprintable() and "\\x1b[31mred\\u202egnp" in error.message

    @click.command(cls=Command)
    def main():
        print(f"found {STEERING} there")
        click.echo(f"café\t{STEERING}", err=True)
        print("\rbar\n", end="")
        print("\n\x1b[A", end="")  # how bars move
        raise UserError(STEERING)

    run = click.testing.CliRunner().invoke(main, [])
    assert run.exit_code == 2 and "café\t" in run.stderr and "\rbar\n" in run.stdout
    rest = run.output.replace("\x1b[A", "").replace("\r", "")
    assert all(c.isprintable() or c in "\n\t" for c in rest), ascii(rest)
    assert run.stdout.startswith("found \\x1b]0;title\\x07\\x1b[2J") and "Error: \\x1b]0;" in run.stderr


def test_keys_are_quoted_briefly():
    for key in (text("k" * 100_000), number(7), b"N"):
        refuse(b"}" + key + b"K\x01s.", "is not an EDM network", load_edm_network)
        refuse(b"}" + key + b"K\x01s.", "holds no AMED predictor", load_predictor)
