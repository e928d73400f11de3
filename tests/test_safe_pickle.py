"""Reading official pickles as data, and networks from them."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from models.edm import EDMDenoiser, load_edm_network, load_edm_safetensors, save_edm_safetensors
from torch_utils.errors import UserError
from torch_utils.safe_pickle import PersistentObject, UnsafePickleError, safe_load

REPO = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "golden" / "pickle_fixtures"
EDM = json.loads((FIXTURES / "edm_expected.json").read_text())
AMED = json.loads((FIXTURES / "amed_expected.json").read_text())
HOSTILE = sorted((FIXTURES / "malicious").glob("*.pkl"))


# --------------------------------------------------------------------------------------------------
# The real structure


@pytest.mark.parametrize("name", EDM)
def test_edm_content(name):
    expected = EDM[name]
    content = safe_load(FIXTURES / name)
    assert list(content) == expected["top_level_keys"]
    net = content["ema"]
    assert net.class_name == "EDMPrecond" and net.init_kwargs == expected["init_kwargs"]
    state = net.state_dict()
    assert [[key, list(value.shape)] for key, value in state.items()] == expected["state_dict"]
    assert sum(value.double().sum().item() for value in state.values()) == pytest.approx(
        expected["state_dict_sum"], abs=1e-9
    )
    attributes = {key: float("inf") if value == "inf" else value for key, value in expected["attributes"].items()}
    assert {key: net.attributes[key] for key in attributes} == attributes


@pytest.mark.parametrize("name", EDM)
def test_edm_network_equals_golden(name):
    net = load_edm_network(FIXTURES / name)
    assert isinstance(net, EDMDenoiser) and not net.training
    assert not any(p.requires_grad for p in net.parameters())
    golden = np.load(FIXTURES / f"{name}.expected.npz")
    cond = {"class_labels": torch.from_numpy(golden["class_labels"])} if "class_labels" in golden else {}
    for i, sigma in enumerate(golden["sigmas"]):
        expected = golden[f"D__{i}"]
        result = net(torch.from_numpy(golden[f"x__{i}"]), torch.tensor(sigma), **cond).numpy()
        assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", AMED)
def test_amed_content(name):
    expected, golden = AMED[name], np.load(FIXTURES / f"{name}.expected.npz")
    content = safe_load(FIXTURES / name)
    model, loss = content["model"], content["loss_fn"]
    assert [model.class_name, loss.class_name] == expected["classes"]
    assert model.init_kwargs == expected["init_kwargs"] and model.attributes == expected["model_attributes"]
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), golden[f"weight:{key}"])
    assert f"global solvers_amed.{loss.state['solver_tea']}" == expected["loss_state"]["solver_tea"]
    np.testing.assert_array_equal(loss.state["t_steps"].numpy(), golden["loss_t_steps"])
    assert loss.state["t_steps"].device.type == "cpu"  # written on cuda:0
    for i, tensor in enumerate(loss.state["buffer_model"]):
        np.testing.assert_array_equal(tensor.numpy(), golden[f"loss_buffer_model_{i}"])


def test_full_snapshot_keeps_inert_objects():
    content = safe_load(FIXTURES / "edm_song_snapshot_full.pkl")
    assert content["loss_fn"].class_name == "EDMLoss" and content["augment_pipe"].class_name == "AugmentPipe"
    assert content["loss_fn"].attributes["P_mean"] == -1.2
    enc = content["ema"].state["_modules"]["model"].state["_modules"]["enc"]
    assert enc.class_name == "torch.nn.modules.container.ModuleDict" and isinstance(enc, PersistentObject)


def test_file_objects(tmp_path):
    path = FIXTURES / "amed_cifar10_amed.pkl"
    with path.open("rb") as file:
        assert list(safe_load(file)) == ["model", "loss_fn"]

    class Stream:  # like the body of an HTTP response: no seek
        read = io.BytesIO(path.read_bytes()).read

    assert list(safe_load(Stream())) == ["model", "loss_fn"]
    assert load_edm_network(io.BytesIO((FIXTURES / "edm_song_ema.pkl").read_bytes())).img_resolution == 16


# --------------------------------------------------------------------------------------------------
# Hostile files


def test_hostile_fixtures_are_refused_without_side_effect(tmp_path):
    code = """
import sys
from models.edm import load_edm_network
from torch_utils.safe_pickle import UnsafePickleError, safe_load
for path in sys.argv[1:]:
    for load in (safe_load, load_edm_network):
        try:
            load(path)
            print("loaded", path)
        except UnsafePickleError as error:
            print(error)
"""
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *map(str, HOSTILE)]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "loaded" not in run.stdout, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert len(HOSTILE) == 3 and len(lines) == 6
    for path, refusals in zip(HOSTILE, (lines[0:2], lines[2:4], lines[4:6]), strict=True):
        wanted = "builtins.eval" if path.stem == "builtins_eval" else "os.system"
        assert all(path.name in line and f"'{wanted}'" in line for line in refusals)
    assert list(tmp_path.iterdir()) == []


PROTO = b"\x80\x04"


def _stack_global(module: str, name: str) -> bytes:
    def text(s):
        return pickle.BINUNICODE + len(s.encode()).to_bytes(4, "little") + s.encode()

    return text(module) + text(name) + pickle.STACK_GLOBAL


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"),
        ("builtins", "exec"),
        ("functools", "partial"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch_utils.persistence", "os.system"),
        ("torch_utils.safe_pickle", "safe_load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("torch.nn.modules.container", "Sequential"),
        ("solvers_amed", "get_denoised"),
        ("collections", "OrderedDict.fromkeys"),
    ],
)
def test_any_other_global_is_named_and_refused(module, name):
    for stream in (PROTO + _stack_global(module, name) + b".", f"c{module}\n{name}\n.".encode()):
        with pytest.raises(UnsafePickleError) as caught:
            safe_load(io.BytesIO(stream))
        assert f"'{module}.{name}'" in str(caught.value)
        assert isinstance(caught.value, UserError) and isinstance(caught.value, pickle.UnpicklingError)


def test_old_instantiation_opcode_names_the_global():
    with pytest.raises(UnsafePickleError, match="os.system"):
        safe_load(io.BytesIO(b"(S'touch MARKER'\nios\nsystem\n."))


BUILDER = _stack_global("torch.storage", "_load_from_bytes")
MODULE = _stack_global("torch.nn.modules.activation", "Sigmoid")
ODICT = _stack_global("collections", "OrderedDict")


@pytest.mark.parametrize(
    "body, message",
    [
        (BUILDER + b"}b.", "sets the state of"),  # of a function
        (ODICT + b"}b.", "sets the state of"),  # of a class
        (MODULE + b"}b.", "sets the state of"),
        (MODULE + b")\x81}\x8c\x01aK\x01sb}\x8c\x01aK\x02sb.", "sets the state of"),  # a second time
        (MODULE + b")R.", "calls something"),
        (b"K\x01)R.", "calls something"),
        (BUILDER + b")\x81.", "instantiates something"),
        (ODICT + b")}\x92.", "instruction 146"),  # NEWOBJ_EX
        (b"\x82\x01.", "instruction 130"),  # EXT1
        (b"]K\x01K\x02s.", "not a dictionary"),
        (b"}(K\x01K\x02e.", "not a list"),
        (b"}((((((tttttK\x01u.", "tuple serves as a key"),
        (b"\x8f((((((ttttt\x90.", "tuple serves as a key"),
        (b"K\x05Q.", "outside the stream"),
    ],
)
def test_misuse_of_allowed_names(body, message):
    with pytest.raises(UnsafePickleError, match=message):
        safe_load(io.BytesIO(PROTO + body))


def _storage_stream(count: int, stored: int, kind: str = "FloatStorage") -> bytes:
    """A nested storage that announces ``count`` elements and holds ``stored`` (old torch.save)."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, system))
    number = pickle.dumps(count, 2)[2:-1]
    pid = (
        b"(X\x07\x00\x00\x00storagectorch\n"
        + kind.encode()
        + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + number
        + b"Nt"
    )
    tail = pickle.dumps(["0"], 2) + count.to_bytes(8, "little") + np.arange(stored, dtype=np.float32).tobytes()
    return head + b"\x80\x02" + pid + b"Q." + tail


def _tensor_stream(storage: bytes, offset: int, size: tuple, stride: tuple) -> bytes:
    def raw(value):
        return pickle.dumps(value, 4, fix_imports=False).removeprefix(PROTO)[:-1]

    def strip_frame(data):
        return data[9:] if data[:1] == b"\x95" else data

    args = b"(" + BUILDER + b"B" + len(storage).to_bytes(4, "little") + storage + b"\x85R"
    for value in (offset, size, stride, False):
        args += strip_frame(raw(value)).replace(b"\x94", b"")
    return PROTO + _stack_global("torch._utils", "_rebuild_tensor_v2") + args + ODICT + b")Rt" + b"R."


def test_tensor_views():
    stream = _storage_stream(6, 6)
    tensor = safe_load(io.BytesIO(_tensor_stream(stream, 1, (2, 2), (1, 3))))
    np.testing.assert_array_equal(tensor.numpy(), [[1, 4], [2, 5]])
    assert safe_load(io.BytesIO(_tensor_stream(stream, 0, (), ()))).item() == 0
    assert safe_load(io.BytesIO(_tensor_stream(stream, 6, (0, 3), (3, 1)))).shape == (0, 3)


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (7,), (1,)),
        (3, (2, 2), (2, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (1 << 40,), (0,)),
        (0, (3, 3), (1, 1)),
        (0, (2, 2), (1,)),
        (1 << 62, (1,), (1,)),
        (7, (0,), (1,)),
    ],
)
def test_tensors_outside_their_storage(offset, size, stride):
    with pytest.raises(UnsafePickleError, match="tensor"):
        safe_load(io.BytesIO(_tensor_stream(_storage_stream(6, 6), offset, size, stride)))


def test_announced_sizes_are_held_against_the_file():
    for count in (7, 1 << 33, 1 << 59, 1 << 80):
        with pytest.raises(UnsafePickleError):
            safe_load(io.BytesIO(_tensor_stream(_storage_stream(count % (1 << 63), 6), 0, (6,), (1,))))
    with pytest.raises(UnsafePickleError, match="ends early"):
        safe_load(io.BytesIO(PROTO + pickle.BINBYTES8 + (1 << 50).to_bytes(8, "little") + b"."))
    with pytest.raises(UnsafePickleError, match="QInt8Storage"):
        safe_load(io.BytesIO(_tensor_stream(_storage_stream(6, 6, "QInt8Storage"), 0, (6,), (1,))))


def test_cycles_and_depth_end_in_a_message():
    deep = PersistentObject("Deep", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    deep.state["_modules"]["self"] = deep
    with pytest.raises(UserError, match="damaged"):
        deep.state_dict()
    assert safe_load(io.BytesIO(PROTO + b")" + b"\x85" * 200_000 + b"0K\x01.")) == 1
    shared = PersistentObject("Leaf", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    for _ in range(20):  # a million names of few objects
        shared = PersistentObject("Pair", {**deep.state, "_modules": {"a": shared, "b": shared}})
    with pytest.raises(UserError, match="too many parts"):
        shared.state_dict()


@pytest.mark.parametrize(
    "data", [b"", b".", b"hello", b"\x80", b"PK\x03\x04junk", b"\x00" * 64, b"\x80\x04\x95\xff\xff", b"<html>"]
)
def test_garbage(data, tmp_path):
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    for load in (safe_load, load_edm_network):
        with pytest.raises(UnsafePickleError, match="file.pkl"):
            load(path)


def test_truncated_and_flipped_files_raise_user_errors_only():
    data = (FIXTURES / "amed_cifar10_amed.pkl").read_bytes()
    rng = np.random.default_rng(0)
    for cut in rng.integers(1, len(data), 40):
        with pytest.raises(UnsafePickleError):
            safe_load(io.BytesIO(data[:cut]))
    for _ in range(150):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 8):
            damaged[position] = rng.integers(256)
        with contextlib.suppress(UserError):  # nothing else may come out; a flip within the weights goes unnoticed
            safe_load(io.BytesIO(bytes(damaged)))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        safe_load(tmp_path / "none.pkl")
    with pytest.raises(UserError, match="cannot read"):
        safe_load(tmp_path)


# --------------------------------------------------------------------------------------------------
# torch.save of objects


def make_original_predictor(monkeypatch):
    """(content, weights): objects pickled as by the original code, from made-up modules."""

    def module(name, **members):
        fake = types.ModuleType(name)
        for key, member in members.items():
            member.__module__, member.__qualname__ = name, key
            setattr(fake, key, member)
        monkeypatch.setitem(sys.modules, name, fake)

    def reconstruct(meta):
        raise RuntimeError("embedded source must not be executed")

    def persistent(self):
        source = 'raise RuntimeError("embedded source must not be executed")'
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": type(self).__name__}
        return reconstruct, (meta | {"state": self.__dict__},)

    def sampler():
        pass

    module("torch_utils.persistence", _reconstruct_persistent_obj=reconstruct)
    module("solvers_amed", heun_sampler=sampler)

    class Linear(torch.nn.Linear):
        __reduce__ = persistent

        def __reduce_ex__(self, protocol):
            return self.__reduce__()

    class AMED_predictor(torch.nn.Module):
        __reduce__ = persistent

        def __reduce_ex__(self, protocol):
            return self.__reduce__()

    class AMED_loss:
        __reduce__ = persistent

    options = json.loads((FIXTURES / "amed_expected.json").read_text())["amed_cifar10_ipndm.pkl"]["init_kwargs"]
    torch.manual_seed(0)
    model = AMED_predictor()
    model.__dict__.update(options, _init_args=(), _init_kwargs=options)
    model.map_layer0 = Linear(8, 8)
    model.enc_layer0, model.enc_layer1 = Linear(64, 128), Linear(128, 4)
    model.fc_r, model.fc_scale_dir, model.fc_scale_time = Linear(20, 1), Linear(20, 1), Linear(20, 1)
    model.sigmoid = torch.nn.Sigmoid()
    model.heads = torch.nn.ModuleDict()
    model.register_buffer("kept_out", torch.ones(2), persistent=False)
    model.numpy_value, model.raw = np.float64(0.25), b"\x00\xff"
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    loss = AMED_loss()
    loss.__dict__.update(sigma_min=0.004, sigma_max=70.0, solver_tea=sampler, t_steps=torch.linspace(1, 2, 4).double())
    return {"model": model, "loss_fn": loss}, weights


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_torch_save_of_objects(zip_format, whole, tmp_path, monkeypatch):
    content, weights = make_original_predictor(monkeypatch)
    torch.save(content if whole else content["model"], tmp_path / "p.pt", _use_new_zipfile_serialization=zip_format)
    assert zipfile.is_zipfile(tmp_path / "p.pt") == zip_format
    loaded = safe_load(tmp_path / "p.pt")
    model = loaded["model"] if whole else loaded
    assert model.class_name == "AMED_predictor" and model.attributes["sampler_stu"] == "ipndm"
    assert model.attributes["numpy_value"] == 0.25 and model.attributes["raw"] == b"\x00\xff"
    state = model.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[key], weights[key]) for key in weights)
    if whole:
        assert loaded["loss_fn"].state["solver_tea"] == "heun_sampler"
        assert torch.equal(loaded["loss_fn"].state["t_steps"], torch.linspace(1, 2, 4).double())


@pytest.mark.parametrize("zip_format", [True, False])
def test_torch_save_keeps_every_dtype_and_shared_storages(zip_format, tmp_path):
    base = torch.arange(12).reshape(3, 4)
    content = OrderedDict(
        {
            str(dtype): base.to(dtype)
            for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool)
        }
    )
    content |= {
        "int": base,
        "view": base[1:, ::2],
        "transposed": base.t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.ones(0),
    }
    torch.save(content, tmp_path / "t.pt", _use_new_zipfile_serialization=zip_format)
    loaded = safe_load(tmp_path / "t.pt")
    assert list(loaded) == list(content)
    for key, value in content.items():
        assert loaded[key].dtype == value.dtype and torch.equal(loaded[key], value), key
    assert loaded["view"].untyped_storage().data_ptr() == loaded["int"].untyped_storage().data_ptr()


@pytest.mark.parametrize("zip_format", [True, False])
def test_truncated_torch_save(zip_format, tmp_path):
    torch.save({"a": torch.randn(100)}, tmp_path / "t.pt", _use_new_zipfile_serialization=zip_format)
    data = (tmp_path / "t.pt").read_bytes()
    for cut in np.linspace(1, len(data) - 1, 25).astype(int):
        with pytest.raises(UnsafePickleError):
            safe_load(io.BytesIO(data[:cut]))


@pytest.mark.parametrize("zip_format", [True, False])
def test_hostile_torch_save(zip_format, tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/MARKER",)

    torch.save({"model": Payload()}, tmp_path / "t.pt", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(UnsafePickleError, match="'(posix|nt).system'"):
        safe_load(tmp_path / "t.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["t.pt"]


def test_zip_bombs(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "t.pt")
    with (
        zipfile.ZipFile(tmp_path / "t.pt") as good,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as bad,
    ):
        for info in good.infolist():
            bad.writestr(info.filename, good.read(info))
    with pytest.raises(UnsafePickleError, match="compressed"):
        safe_load(tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as other:
        other.writestr("notes/readme.txt", "hello")
    with pytest.raises(UnsafePickleError, match="not one written by torch.save"):
        safe_load(tmp_path / "c.pt")


# --------------------------------------------------------------------------------------------------
# EDM networks


def test_wrong_content_is_described(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"the entry 'ema' is missing; found.*model \(an object of class AMED_predictor\)"
    ):
        load_edm_network(FIXTURES / "amed_cifar10_amed.pkl")
    for value, message in (([1, 2], "found a list"), ({"ema": 3}, "found a int"), ({}, "nothing")):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match=message):
            load_edm_network(tmp_path / "x.pkl")


def _reference_net():
    return load_edm_network(FIXTURES / "edm_song_ema.pkl")


def test_edm_safetensors_roundtrip(tmp_path):
    net = _reference_net()
    net.data_mean, net.data_std = torch.rand(3, 16, 16), 0.3
    save_edm_safetensors(net, tmp_path / "net.safetensors", {"licence": "none", "images_seen": 12})
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    from safetensors import safe_open

    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert file.metadata()["licence"] == "none" and json.loads(file.metadata()["images_seen"]) == 12
        assert all(key.startswith("model.") for key in list(file.keys()) if key not in ("data_mean", "data_std"))
    x = torch.randn(2, 3, 16, 16)
    for load in (load_edm_network, load_edm_safetensors):
        other = load(tmp_path / "net.safetensors")
        assert torch.equal(other(x, 1.5), net(x, 1.5)) and torch.equal(other.data_mean, net.data_mean)
        assert other.data_std == pytest.approx(0.3) and other.config.items() >= net.config.items()
        assert not other.training and not any(p.requires_grad for p in other.parameters())
    save_edm_safetensors(_reference_net(), tmp_path / "plain.safetensors")
    assert load_edm_safetensors(tmp_path / "plain.safetensors").data_mean is None


def test_bad_edm_safetensors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "net.safetensors"
    net = _reference_net()
    state = {key: value.clone() for key, value in net.state_dict().items()}

    def refuse(tensors, config, message):
        save_file(tensors, path, {"config": config} if config is not None else None)
        with pytest.raises(UserError, match=message):
            load_edm_network(path)

    refuse(state, None, "no 'config'")
    refuse(state, "[1", "not a JSON object")
    refuse({"other": torch.ones(1)}, json.dumps(net.config), "weights do not fit|do not belong")
    refuse(state, json.dumps({**net.config, "model_channels": 16}), "weights do not fit")
    refuse(state, json.dumps({**net.config, "model_channels": 1 << 40}), "net.safetensors")
    refuse(state, json.dumps({**net.config, "num_blocks": 1 << 40}), "is too large")
    refuse(state, json.dumps({**net.config, "surprise": 1}), "surprise")
    refuse({**state, "data_mean": torch.ones(3, 4, 4)}, json.dumps(net.config), "data_mean has shape")
    save_edm_safetensors(net, path)
    data = path.read_bytes()
    for cut in (9, 200, len(data) - 4):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="net.safetensors"):
            load_edm_network(path)
