"""Weights from foreign checkpoints: no import, no call, and the file is mapped, not copied."""

import contextlib
import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torch_utils.errors import UserError
from torch_utils.safe_pickle import (
    ForeignName,
    PersistentObject,
    UnsafePickleError,
    safe_load,
    safe_load_checkpoint,
)
from torch_utils.tensor_file import read_weights


def weights():
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return OrderedDict(a=base, b=base.t()[1:], half=torch.randn(3).half(), count=torch.tensor(7))


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A module whose import leaves a mark, importable while reading; its classes, to pickle."""
    source = tmp_path / "path" / "foreign_training.py"
    source.parent.mkdir()
    source.write_text(f"open({str(tmp_path / 'MARK_import')!r}, 'w')\nclass Callback: pass\n")
    monkeypatch.syspath_prepend(source.parent)
    module = types.ModuleType("foreign_training")

    class Callback:
        def __init__(self, **attributes):
            self.__dict__.update(attributes)

    class Config(dict):
        pass

    class Slots:
        __slots__ = ("value",)

    class WithArguments:
        def __getnewargs_ex__(self):
            return (1,), {"key": 2}

        def __new__(cls, *args, **kwargs):
            return super().__new__(cls)

    for cls in (Callback, Config, Slots, WithArguments):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def lightning(foreign, tmp_path):
    """A PyTorch-Lightning checkpoint with every way in which objects of classes are pickled."""
    slots = foreign.Slots()
    slots.value = 5
    return {
        "hostile": Call(os.system, f"touch {tmp_path / 'MARK_system'}"),
        "epoch": 3,
        "state_dict": weights(),
        "callbacks": {foreign.Callback: {"best": torch.tensor(0.5), "path": "model.ckpt"}},
        "hyper_parameters": foreign.Config(lr=1e-4, nested=foreign.Config(a=1)),
        "objects": [
            foreign.Callback(monitor="loss", inner=foreign.Callback()),
            slots,
            foreign.WithArguments(),
            {foreign.Callback()},
            {(0, "pair"): 1},
        ],
    }


def marks(tmp_path):
    return [path.name for path in tmp_path.iterdir() if path.name.startswith("MARK")]


@pytest.mark.parametrize("zip_format", [True, False])
def test_lightning_checkpoint_is_inert(zip_format, foreign, tmp_path, monkeypatch):
    path = tmp_path / "model.ckpt"
    torch.save(lightning(foreign, tmp_path), path, _use_new_zipfile_serialization=zip_format, pickle_protocol=4)
    monkeypatch.delitem(sys.modules, "foreign_training")  # from here on its import would leave a mark
    found = read_weights(path)
    assert list(found) == list(weights())
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in weights().items()
    )
    content = safe_load_checkpoint(path)
    (key,) = content["callbacks"]
    assert isinstance(key, ForeignName) and key.name == "foreign_training.Callback"
    assert content["callbacks"][key]["path"] == "model.ckpt" and content["epoch"] == 3
    first = content["objects"][0]
    assert isinstance(first, PersistentObject) and first.class_name == "foreign_training.Callback"
    assert first.state["monitor"] == "loss" and first.state["inner"].class_name == "foreign_training.Callback"
    assert content["objects"][-1] == {(0, "pair"): 1}
    assert content["hostile"].class_name in ("posix.system", "nt.system") and content["hostile"].state == {}
    assert "foreign_training" not in sys.modules and marks(tmp_path) == []
    with pytest.raises(UnsafePickleError, match="is not on the safe list"):
        safe_load(path)  # which is for networks in pickles: it goes on refusing
    # The file would do both if it were read in the ordinary way.
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert sorted(marks(tmp_path)) == ["MARK_import", "MARK_system"]


def test_hostile_weights_are_refused(tmp_path):
    """A call in the place of a tensor, of its storage, and of the whole file."""
    mark = tmp_path / "MARK_system"
    call = Call(os.system, f"touch {mark}")
    with_tensor = Call(torch._utils._rebuild_tensor_v2, call, 0, (1,), (1,), False, OrderedDict())
    for number, content in enumerate(({"state_dict": {"w": call}}, {"w": with_tensor}, call)):
        path = tmp_path / f"{number}.ckpt"
        torch.save(content, path)
        with pytest.raises(UserError, match=path.name) as caught:
            read_weights(path)
        assert "\n" not in str(caught.value) and marks(tmp_path) == []


def test_inert_objects_cannot_be_called_or_filled():
    def body(text):
        return io.BytesIO(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2) + b"\x80\x02" + text + b".\x80\x02].")  # fmt: skip

    system = b"cos\nsystem\n"
    assert isinstance(safe_load_checkpoint(body(system)), ForeignName)
    assert safe_load_checkpoint(body(system + b")R}X\x01\x00\x00\x00aK\x01sb")).state == {"a": 1}
    assert safe_load_checkpoint(body(system + b")RK\x01K\x02s(K\x01K\x02u(K\x01e")).state == {}  # items are dropped
    assert safe_load_checkpoint(body(system + b")R}bK\x05b")).state == {}  # so is what is no dictionary
    for misuse, message in (
        (b"})\x85K\x01s", "tuple serves as a key"),
        (b"(S'x'\nios\nsystem\n", "instantiates 'os.system'"),
        (system + b"K\x01b", "sets the state of a ForeignName"),
        (b"K\x01)R", "calls something"),
        (b"K\x01)}\x92", "instantiates something"),
        (system + b")Q", "unknown outside data"),
    ):
        with pytest.raises(UnsafePickleError, match=message):
            safe_load_checkpoint(body(misuse))


@pytest.mark.parametrize("protocol", [2, 5])
def test_the_file_is_mapped(protocol, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(weights(), path, pickle_protocol=protocol)
    before = path.read_bytes()
    found = read_weights(path)
    assert {value.untyped_storage().nbytes() for value in found.values()} == {len(before)}  # all are views of the file
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == 1
    found["a"].fill_(1)
    assert found["b"].eq(1).all() and path.read_bytes() == before  # shared among each other, private to this process
    with path.open("rb") as file:  # a file object cannot be mapped
        assert torch.equal(safe_load_checkpoint(file)["a"], weights()["a"])


def test_other_containers(tmp_path):
    expected = {name: value.clone() for name, value in weights().items()}
    save_file({name: value.contiguous() for name, value in expected.items()}, tmp_path / "w.safetensors")
    torch.save(expected, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "old.pt"):
        found = read_weights(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_unusable_files_end_in_one_line(tmp_path):
    good = tmp_path / "good.ckpt"
    torch.save({"state_dict": weights()}, good)
    save_file({"a": torch.ones(100)}, tmp_path / "good.safetensors")
    files = {
        "cut.ckpt": (good.read_bytes()[:-300], "truncated: it lacks its end"),
        "cut.safetensors": ((tmp_path / "good.safetensors").read_bytes()[:-10], "not a readable safetensors"),
        "page.ckpt": (b"<html>Not found</html>", "not a readable|was refused"),
        "empty.ckpt": (b"", "not a readable|was refused"),
    }
    for name, (data, message) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as caught:
            read_weights(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    for content, message in (
        ({"state_dict": {}}, "it is empty"),
        ({"model": [1, 2]}, "entry 'model' is a list"),
        ([1], "it is a list"),
        ({"state_dict": {"w": 1.0}}, "entry 'w' is a float"),
        ({3: torch.ones(1)}, "an entry is named by a int, not by a string"),
    ):
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / "other.ckpt")
    save_file({}, tmp_path / "empty.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="holds no weights: it is empty"):
        read_weights(tmp_path / "empty.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        read_weights(tmp_path / "none.ckpt")


def test_damaged_zip_files(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(weights(), path)
    data = path.read_bytes()
    torch.manual_seed(1)
    for _ in range(60):
        damaged = bytearray(data)
        for position in torch.randint(len(data), (6,)).tolist():
            damaged[position] ^= 0xFF
        Path(path).write_bytes(bytes(damaged))
        with contextlib.suppress(UserError):  # nothing else may come out; a flip within the weights goes unnoticed
            for value in read_weights(path).values():
                value.sum()
    several_disks = bytearray(data)
    locator = data.rindex(b"PK\x06\x07")  # of the zip64 directory, which torch.save always writes
    several_disks[locator + 16] = 9
    path.write_bytes(several_disks)
    with pytest.raises(UserError, match="not a readable .* disks"):
        read_weights(path)
