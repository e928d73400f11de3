"""Reads pickled networks without running anything in the file.

Official EDM networks and snapshots of the original AMED code are pickles that carry Python source,
which ``pickle`` would execute. Here a file is data only. The unpickler of the standard library (the
one in Python) builds dicts, lists and numbers. Its instructions that name, call or fill something
are replaced: they map a list of exact global names to functions of this module, and refuse all
others. Objects become inert ``PersistentObject`` records, from which the caller rebuilds its own
classes. Three containers are supported: a plain pickle, and both formats of ``torch.save``.

PyTorch-Lightning checkpoints hold objects of arbitrary classes beside the weights. For them, a
second mode records an unknown name instead of refusing it, and everything made from it is an empty
or inert record. This mode, too, imports and calls nothing.

One ``_Budget`` per file bounds the cost of reading: every instruction, copied item and unpacked
byte is paid in advance. (``torch.load(weights_only=True)`` has no such bound and refuses Lightning
checkpoints; the standard unpickler hashes any key that a file names.)
"""

import contextlib
import io
import math
import pickle
import pickletools
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from torch_utils.errors import UserError
from torch_utils.file_kind import explain, file_kind
from torch_utils.zip_file import open_zip, read_member

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first value of a file in the older torch.save format
_LEGACY_PROTOCOL = 1001
_MAX_DEPTH = 32  # nesting of modules
_MAX_TENSORS = 100_000
_MAX_NAME = 1000  # characters of the dotted name of a tensor
_DEEPEST = 200  # nesting of plain containers
_MOST_OBJECTS = 1_000_000  # instructions of a file; a network of 1,000 tensors needs about 40,000
_PRICE_OF_CONTAINER = 3  # in objects, for a new container
_PRICE_OF_KEY = 1000  # in objects, for keys whose hashes a file could make collide
_MOST_BITS = 512  # of a whole number; Python prints up to 4,300 digits


class UnsafePickleError(UserError, pickle.UnpicklingError):
    """The file needs more than plain data, or is damaged. Nothing in it was executed."""


def _require(condition, message: str) -> None:
    if not condition:
        raise UnsafePickleError(message)


class _Budget:
    """The remaining cost of reading a file, in objects and in unpacked or copied bytes."""

    def __init__(self, size: int):
        self.objects = _MOST_OBJECTS
        self.bytes = 3 * size + (1 << 20)  # storages are copied once, and tensors may share them

    def pay(self, objects: int = 0, size: int = 0, for_keys: bool = False) -> None:
        self.objects -= objects
        self.bytes -= size
        what = "keys that are not texts or small numbers" if for_keys else f"parts (more than {_MOST_OBJECTS})"
        _require(self.objects >= 0, f"it has too many {what}")
        _require(self.bytes >= 0, "its tensors and texts unpack to far more than the file holds")


# --------------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True, eq=False, repr=False)
class PersistentObject:
    """An object of the file as inert data.

    class_name: name of its class: bare for objects of ``torch_utils.persistence`` ("EDMPrecond"),
        full for plain torch modules ("torch.nn.modules.container.ModuleDict").
    state: its instance dictionary.
    """

    class_name: str
    state: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"PersistentObject({self.class_name})"

    @property
    def init_kwargs(self) -> dict:
        """The keyword arguments of the object's constructor."""
        kwargs = self.state.get("_init_kwargs")
        if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
            raise UserError(f"the stored {self.class_name} does not say how it was constructed (_init_kwargs)")
        return dict(kwargs)

    @property
    def attributes(self) -> dict:
        """The public instance attributes."""
        return {k: v for k, v in self.state.items() if isinstance(k, str) and not k.startswith("_")}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers by dotted name, as ``torch.nn.Module.state_dict``."""
        tensors: dict[str, torch.Tensor] = {}
        try:
            self._collect(tensors, _Budget(0), "", _MAX_DEPTH)
        except UnsafePickleError as error:
            raise UserError(f"the stored {self.class_name} is damaged: {error}") from None
        check_sharing(tensors, f"the stored {self.class_name}")
        return tensors

    def _part(self, name: str, budget: _Budget) -> list[tuple]:
        part = self.state.get(name)
        if not isinstance(part, dict):
            raise UserError(f"the stored {self.class_name} is not a network: it has no {name}")
        budget.pay(10 * (1 + len(part)))  # objects can share a dictionary, so few bytes can hold many entries
        return [(key, value) for key, value in part.items() if value is not None]

    def _collect(self, tensors: dict, budget: _Budget, prefix: str, depth: int) -> None:
        def check(name, good) -> str:
            path = f"{prefix}{name}" if isinstance(name, str) and len(name) <= _MAX_NAME else f"{prefix}..."
            if not good or len(path) > _MAX_NAME or path.endswith("..."):
                raise UserError(f"the stored {self.class_name} is damaged at '{path[:200]}'")
            return path

        skipped = self.state.get("_non_persistent_buffers_set")
        skipped = skipped if isinstance(skipped, set) else ()
        buffers = [(name, value) for name, value in self._part("_buffers", budget) if name not in skipped]
        for name, value in [*self._part("_parameters", budget), *buffers]:
            tensors[check(name, isinstance(value, torch.Tensor) and len(tensors) < _MAX_TENSORS)] = value
        for name, value in self._part("_modules", budget):
            path = check(name, isinstance(value, PersistentObject) and depth > 0)
            value._collect(tensors, budget, f"{path}.", depth - 1)


def check_sharing(tensors: dict[str, torch.Tensor], whose: str) -> None:
    """Raises UserError if tensors have many more elements than memory: copies would fill it up."""
    named = sum(value.numel() * value.element_size() for value in tensors.values())
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    if named > 4 * sum(storages.values()) + (1 << 20):
        raise UserError(f"{whose} is damaged: its tensors are {named} bytes in the memory of {sum(storages.values())}")


@dataclass(frozen=True, eq=False)
class ForeignName:
    """An unknown global of the file. name: its dotted name."""

    name: str


# --------------------------------------------------------------------------------------------------
# Values of the globals of a file. None is a function or class that the file could call: only the
# machine below calls a _Builder and instantiates a _PlainModule.


@dataclass(frozen=True)
class _Builder:
    function: object


@dataclass(frozen=True)
class _PlainModule:
    name: str


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    flat: torch.Tensor  # [numel]


@dataclass
class _NumpyType:
    code: str
    order: str = "<"


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


def _is_text(value, *known: str) -> bool:
    return type(value) is str and (not known or value in known)


def _build_persistent(machine, meta=None) -> PersistentObject:
    """The record of one object. Its ``module_src`` (Python source) is dropped unread."""
    _require(isinstance(meta, dict) and _is_text(meta.get("type"), "class"), "an object is not a class instance")
    version, name, state = meta.get("version"), meta.get("class_name"), meta.get("state")
    _require(type(version) is int and version == 6, "a persistent object is not of version 6, the only one known")
    good = _is_text(name) and len(name) <= 200 and isinstance(state, dict)
    _require(good, "a persistent object has no class name or no state")
    return PersistentObject(name, state)


def _build_ordered_dict(machine, pairs=()) -> OrderedDict:
    _require(isinstance(pairs, (list, tuple)), "an OrderedDict is built from something else than pairs")
    machine.budget.pay(3 * len(pairs))
    _require(all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs), "an OrderedDict is not built from pairs")
    machine.check_keys([key for key, _ in pairs])
    return OrderedDict((key, value) for key, value in pairs)


def _build_set(machine, items=()) -> set:
    _require(isinstance(items, (list, tuple)), "a set is built from something else than a list")
    machine.budget.pay(3 * len(items))
    machine.check_keys(items)
    return set(items)


def _build_bytes(machine, text, encoding) -> bytes:
    """Bytes in the form of pickle protocol 2."""
    _require(_is_text(text) and _is_text(encoding, "latin1"), "bytes are encoded in an unknown way")
    machine.budget.pay(size=len(text))
    return text.encode("latin1")


def _build_numpy_type(machine, code, *flags) -> _NumpyType:
    _require(_is_text(code, "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"), "a numpy type is not a plain number")
    return _NumpyType(code)


def _build_numpy_scalar(machine, kind, data) -> float | int | bool:
    _require(isinstance(kind, _NumpyType) and isinstance(data, bytes), "a numpy scalar is malformed")
    dtype = np.dtype(kind.order + kind.code)
    _require(len(data) == dtype.itemsize, "a numpy scalar has the wrong size")
    return np.frombuffer(data, dtype)[0].item()


def _build_tensor(machine, storage, offset, size, stride, *flags) -> torch.Tensor:
    """A view of the storage, after checking that it is inside and not larger."""
    _require(isinstance(storage, _Storage), "a tensor has no storage")
    _require(isinstance(size, tuple) and isinstance(stride, tuple), "a tensor has no shape")
    _require(len(size) == len(stride) <= 16, "a tensor's size and stride do not belong together")
    _require(all(map(_is_count, (offset, *size, *stride))), "a tensor's shape is not made of counts")
    numel = storage.flat.numel()
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    _require(last < numel and math.prod(size) <= numel, "a tensor reaches beyond its storage")
    machine.budget.pay(50, math.prod(size) * storage.flat.element_size())
    return storage.flat.as_strided(size, stride, storage.flat.storage_offset() + offset)


def _build_parameter(machine, data, *flags) -> torch.Tensor:
    _require(isinstance(data, torch.Tensor), "a parameter is not a tensor")
    return data


def _build_storage(machine, data) -> _Storage:
    """A nested storage, which is a file of the older torch.save. It may name only storages."""
    _require(isinstance(data, bytes), "a nested storage is not bytes")
    machine.budget.pay(size=len(data))  # a file can name one many times
    storage = _load_legacy(_Source(io.BytesIO(data)), _STORAGE_GLOBALS, machine.budget)
    _require(isinstance(storage, _Storage), "a nested storage holds something else")
    return storage


_STORAGE_GLOBALS = {
    ("torch", "FloatStorage"): _StorageType(torch.float32),
    ("torch", "DoubleStorage"): _StorageType(torch.float64),
    ("torch", "HalfStorage"): _StorageType(torch.float16),
    ("torch", "BFloat16Storage"): _StorageType(torch.bfloat16),
    ("torch", "LongStorage"): _StorageType(torch.int64),
    ("torch", "IntStorage"): _StorageType(torch.int32),
    ("torch", "ShortStorage"): _StorageType(torch.int16),
    ("torch", "CharStorage"): _StorageType(torch.int8),
    ("torch", "ByteStorage"): _StorageType(torch.uint8),
    ("torch", "BoolStorage"): _StorageType(torch.bool),
}

# Parts of a state dict. In files with foreign objects all others, also of numpy, are foreign.
_WEIGHT_GLOBALS = {
    ("collections", "OrderedDict"): _Builder(_build_ordered_dict),
    ("torch._utils", "_rebuild_parameter"): _Builder(_build_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): _Builder(_build_tensor),
}

_OBJECT_GLOBALS = {
    **_WEIGHT_GLOBALS,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Builder(_build_persistent),
    ("torch.storage", "_load_from_bytes"): _Builder(_build_storage),
    ("numpy", "dtype"): _Builder(_build_numpy_type),
    ("numpy.core.multiarray", "scalar"): _Builder(_build_numpy_scalar),
    ("numpy._core.multiarray", "scalar"): _Builder(_build_numpy_scalar),
    # torch.save writes protocol 2, which has no opcodes for sets and bytes.
    ("builtins", "set"): _Builder(_build_set),
    ("__builtin__", "set"): _Builder(_build_set),
    ("_codecs", "encode"): _Builder(_build_bytes),
    **{
        ("torch.nn.modules." + module, name): _PlainModule(f"torch.nn.modules.{module}.{name}")
        for module, name in (("container", "ModuleDict"), ("activation", "Sigmoid"))
    },
    **{
        ("solvers_amed", name): name
        for name in (
            "amed_sampler",
            "euler_sampler",
            "ipndm_sampler",
            "dpm_2_sampler",
            "dpm_pp_sampler",
            "heun_sampler",
        )
    },
}


# --------------------------------------------------------------------------------------------------
# Instructions

# Instructions of the standard unpickler that are used unchanged.
_PLAIN = (
    *("mark", "stop", "pop", "pop_mark", "dup", "proto", "frame", "none", "false", "true"),
    *("int", "binint", "binint1", "binint2", "long", "long1", "long4", "float", "binfloat"),
    *("string", "binstring", "short_binstring", "unicode", "binunicode", "short_binunicode", "binunicode8"),
    *("binbytes", "short_binbytes", "binbytes8", "tuple", "empty_tuple", "tuple1", "tuple2", "tuple3"),
    *("empty_list", "empty_dictionary", "empty_set", "list"),
    *("get", "binget", "long_binget", "binput", "long_binput", "memoize"),
)
_OWN = (
    *("append", "appends", "setitem", "setitems", "dict", "additems", "frozenset", "global", "stack_global", "inst"),
    *("reduce", "newobj", "newobj_ex", "build", "binpersid", "put"),
)
_NUMBERS = ("int", "long", "long1", "long4")  # of any length
_CONTAINERS = ("empty_list", "empty_dictionary", "empty_set", "list", "dict", "frozenset", "reduce", "newobj")


class _Dispatch(dict):
    """Functions by the code of their instruction."""

    def __missing__(self, code):
        opcode = pickletools.code2op.get(chr(code))
        _require(opcode is not None, "it is not a pickle: it has an unknown instruction")
        raise UnsafePickleError(
            f"it uses the pickle instruction {code} ({opcode.name}), which plain data does not need"
        )


class _Machine(pickle._Unpickler):
    """The unpickler of the standard library, in Python, without everything that could run code.

    source: the file.
    allowed: values of the globals, by (module, name).
    budget: of the file.
    storage_of: function from a reference to the storage. Default None.
    foreign: unknown names become a ForeignName instead of an error, and objects made from them a
        PersistentObject. Default False.

    Calls, arguments and items of foreign objects are dropped. Their first dictionary of attributes
    is kept as data.
    """

    def __init__(self, source, allowed: dict, budget: _Budget, storage_of=None, foreign: bool = False):
        super().__init__(source, encoding="latin1")
        self.allowed, self.budget, self.storage_of, self.foreign = allowed, budget, storage_of, foreign

    def load_put(self):
        place = int(self.readline()[:-1])
        # Larger numbers may have colliding hashes.
        _require(0 <= place < 1 << 32, "it remembers values under numbers that no file needs")
        self.memo[place] = self.stack[-1]

    # Containers

    def check_keys(self, keys) -> None:
        """Allows simple keys only: hashes may collide, and of deep tuples exhaust the stack."""
        for key in keys:
            parts = (key,)
            if self.foreign and type(key) is tuple:
                self.budget.pay(_PRICE_OF_KEY + len(key), for_keys=True)
                parts = key
            for part in parts:
                if type(part) is str or part is None or type(part) is bool or type(part) is int and abs(part) < 1 << 32:
                    continue
                if self.foreign and isinstance(part, (ForeignName, PersistentObject)):
                    continue
                _require(type(part) in (int, float), f"a {type(part).__name__} serves as a key")
                self.budget.pay(_PRICE_OF_KEY, for_keys=True)

    def _dropped(self) -> bool:
        """Whether items are for a foreign object, which drops them."""
        return self.foreign and isinstance(self.stack[-1], PersistentObject)

    def _set_items(self, items: list) -> None:
        if self._dropped():
            return
        _require(isinstance(self.stack[-1], dict), "it sets items of something that is not a dictionary")
        self.check_keys(items[::2])
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _extend(self, kind: type, items: list) -> None:
        if self._dropped():
            return
        _require(type(self.stack[-1]) is kind, f"it extends something that is not a {kind.__name__}")
        self.stack[-1].extend(items) if kind is list else self.stack[-1].update(items)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self):
        self._set_items(self.pop_mark())

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def load_append(self):
        value = self.stack.pop()
        self._extend(list, [value])

    def load_appends(self):
        self._extend(list, self.pop_mark())

    def load_additems(self):
        items = self.pop_mark()
        self.check_keys(items)
        self._extend(set, items)

    def load_frozenset(self):
        items = self.pop_mark()
        self.check_keys(items)
        self.append(frozenset(items))

    # Names and objects

    def find_class(self, module: str, name: str):
        found = self.allowed.get((module, name))
        if found is None and self.foreign:
            self.budget.pay(_PRICE_OF_CONTAINER)
            return ForeignName(f"{module}.{name}"[:200])
        wanted = f"{module}.{name}"[:200]
        _require(found is not None, f"it asks for the global '{wanted}', which is not on the safe list")
        return found

    def _global_name(self) -> list[str]:
        """Module and name, which follow as lines of text."""
        return [self.readline()[:-1].decode("utf-8") for _ in range(2)]

    def load_global(self):
        self.append(self.find_class(*self._global_name()))

    def load_stack_global(self):
        name, module = self.stack.pop(), self.stack.pop()
        _require(_is_text(module) and _is_text(name), "it names a global by something that is not a text")
        self.append(self.find_class(module, name))

    def load_inst(self):
        module, name = self._global_name()
        self.find_class(module, name)
        raise UnsafePickleError(f"it instantiates '{module[:100]}.{name[:100]}' in an unknown way")

    def load_reduce(self):
        args, callee = self.stack.pop(), self.stack.pop()
        if isinstance(callee, ForeignName):
            self.append(PersistentObject(callee.name))
            return
        good = isinstance(callee, _Builder) and type(args) is tuple
        _require(good, "it calls something that is not a builder")
        self.append(callee.function(self, *args))

    def load_newobj(self):
        args, kind = self.stack.pop(), self.stack.pop()
        good = isinstance(kind, ForeignName) or isinstance(kind, _PlainModule) and args == ()
        _require(good, "it instantiates something that is not a known module")
        self.append(PersistentObject(kind.name))

    def load_newobj_ex(self):
        if not self.foreign:
            self.dispatch.__missing__(pickle.NEWOBJ_EX[0])
        _require(isinstance(self.stack[-3], ForeignName), "it instantiates something that is not a known module")
        self.stack.pop()
        self.load_newobj()

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PersistentObject) and not target.state and isinstance(state, dict):
            self.budget.pay(3 * len(state))
            target.state.update(state)
        elif isinstance(target, PersistentObject) and self.foreign:
            pass  # state of a class with its own format
        elif isinstance(target, _NumpyType):
            good = isinstance(state, tuple) and len(state) > 1 and _is_text(state[1], "<", ">", "|")
            _require(good, "a numpy type has an unknown byte order")
            target.order = state[1]
        else:  # the attributes of an OrderedDict (version notes) carry no data
            _require(isinstance(target, OrderedDict), f"it sets the state of a {type(target).__name__}")

    def load_binpersid(self):
        pid = self.stack.pop()
        _require(self.storage_of is not None, "it refers to data outside the stream")
        self.budget.pay(10)
        self.append(self.storage_of(pid))

    dispatch = _Dispatch()


def _checked(name: str):
    """The instruction ``load_<name>`` of _Machine with its price; limits whole numbers."""
    function, price = getattr(_Machine, f"load_{name}"), 1 + _PRICE_OF_CONTAINER * (name in _CONTAINERS)

    def load(machine):
        machine.budget.pay(price)
        function(machine)
        if name in _NUMBERS:
            _require(abs(machine.stack[-1]) < 1 << _MOST_BITS, "it holds a number of too many digits")

    return load


for _code, _function in pickle._Unpickler.dispatch.items():
    if (_name := _function.__name__.removeprefix("load_")) in (*_PLAIN, *_OWN):
        _Machine.dispatch[_code] = _checked(_name)


# --------------------------------------------------------------------------------------------------
# Containers


class _Source:
    """A seekable binary file that never announces more bytes than it has."""

    def __init__(self, file):
        self._file = file
        start = file.tell()
        self._end = file.seek(0, io.SEEK_END)
        file.seek(start)
        self.readline = file.readline

    def remaining(self) -> int:
        return self._end - self._file.tell()

    def read(self, count: int) -> bytes:
        _require(0 <= count <= self.remaining(), f"it ends early: {count} more bytes were announced")
        return self._file.read(count)


class _Storages:
    """The storages of a file by key. Each is made once, by ``make(key, dtype, numel)``."""

    def __init__(self, make):
        self.make, self.known = make, {}

    def __call__(self, pid) -> _Storage:
        """The storage of a reference of torch.save."""
        good = isinstance(pid, tuple) and len(pid) in (5, 6) and _is_text(pid[0], "storage")
        _require(good, "it refers to unknown outside data")
        _, kind, key, _location, numel, *view = pid
        good = isinstance(kind, _StorageType) and _is_text(key) and _is_count(numel)
        _require(good, "a storage reference is bad")
        _require(not view or view[0] is None, "it holds views of storages, which only very old versions of torch wrote")
        if key not in self.known:
            self.known[key] = _Storage(self.make(key, kind.dtype, numel))
        flat = self.known[key].flat
        good = flat.dtype == kind.dtype and flat.numel() == numel
        _require(good, f"storage {key[:40]} is described in two ways")
        return self.known[key]


def _load_legacy(source: _Source, allowed: dict, budget: _Budget, magic_read: bool = False, foreign: bool = False):
    """The older torch.save format: five pickles, then the raw storages.

    Objects may refer only to storages. ``allowed`` applies to every pickle.
    """
    declared = 0

    def make(key, dtype, numel):
        nonlocal declared
        declared += numel * dtype.itemsize
        _require(declared <= source.remaining(), "its tensors are larger than the file")
        return torch.empty(numel, dtype=dtype)

    storages = _Storages(make)

    def storage_of(pid):
        if isinstance(pid, tuple) and len(pid) == 4 and _is_text(pid[0], "module"):
            return pid[1]  # of (class, source file, source)
        return storages(pid)

    def plain():
        return _Machine(source, {}, budget).load()

    _require(magic_read or plain() == _LEGACY_MAGIC, "it is not a file of torch.save")
    _require(plain() == _LEGACY_PROTOCOL, "it is a file of an unknown version of torch.save")
    system = plain()
    little = isinstance(system, dict) and system.get("little_endian") is True
    _require(little, "it was not written on a little-endian machine")
    result = _Machine(source, allowed, budget, storage_of, foreign).load()
    keys = plain()
    good = isinstance(keys, list) and all(map(_is_text, keys)) and sorted(keys) == sorted(storages.known)
    _require(good, "its list of storages is damaged")
    for key in keys:
        flat = storages.known[key].flat
        _require(int.from_bytes(source.read(8), "little") == flat.numel(), f"storage {key[:40]} has the wrong size")
        _fill(flat, source.read(flat.numel() * flat.element_size()))
    return result


def _fill(flat: torch.Tensor, data: bytes) -> torch.Tensor:
    if flat.numel():
        flat.view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return flat


def _map_member(mapping: torch.Tensor, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> torch.Tensor:
    """The bytes of an uncompressed part as a view of the mapped file (uint8), checksum verified."""
    with archive.open(info):  # checks both headers
        file = archive.fp
    file.seek(info.header_offset)
    header = file.read(30)
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    _require(start + info.file_size <= len(mapping), f"the part {info.filename} reaches beyond the file")
    part = mapping[start : start + info.file_size]
    _require(zlib.crc32(part.numpy()) == info.CRC, f"Bad CRC-32 for the part {info.filename}: download it again")
    return part


def _load_zip(file, allowed: dict, budget: _Budget, foreign: bool = False, mapping: torch.Tensor | None = None):
    """The zip format of torch.save: ``*/data.pkl`` with the object, uncompressed ``*/data/<key>``.

    mapping: the mapped file (uint8 [size]), which the tensors are then views of. Default None.
    """
    with open_zip(file) as archive:
        main = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        _require(len(main) == 1, "it is a zip file, but not one written by torch.save")
        prefix = main[0].removesuffix("data.pkl")

        def locate(name: str) -> zipfile.ZipInfo:
            _require(name in archive.NameToInfo, f"the part {name} is missing")
            info = archive.getinfo(name)
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            _require(stored, f"the part {name} is compressed; torch.save never does that")
            budget.pay(10, info.file_size)
            return info

        def member(name: str) -> bytes:
            info = locate(name)
            return read_member(archive, info, info.file_size)

        def make(key, dtype, numel):
            info = locate(f"{prefix}data/{key}")
            _require(info.file_size == numel * dtype.itemsize, f"storage {key[:40]} has the wrong size")
            if mapping is None:
                return _fill(torch.empty(numel, dtype=dtype), read_member(archive, info, info.file_size))
            part = _map_member(mapping, archive, info)
            aligned = part.storage_offset() % dtype.itemsize == 0
            return (part if aligned else part.clone()).view(dtype)

        if f"{prefix}byteorder" in archive.NameToInfo:
            _require(member(f"{prefix}byteorder") == b"little", "it was not written on a little-endian machine")
        source = _Source(io.BytesIO(member(main[0])))
        return _Machine(source, allowed, budget, _Storages(make), foreign).load()


def _load(file):
    source = _Source(file)
    budget = _Budget(source.remaining())
    allowed = _OBJECT_GLOBALS | _STORAGE_GLOBALS
    if _starts_like_zip(file):
        return _of_sane_extent(_load_zip(file, allowed, budget))
    result = _Machine(source, _OBJECT_GLOBALS, budget).load()
    if isinstance(result, int) and result == _LEGACY_MAGIC:
        result = _load_legacy(source, allowed, budget, magic_read=True)
    return _of_sane_extent(result)


def _load_tolerant(file, path: str | None):
    source = _Source(file)
    size = source.remaining()
    allowed = _WEIGHT_GLOBALS | _STORAGE_GLOBALS
    if not _starts_like_zip(file):
        return _of_sane_extent(_load_legacy(source, allowed, _Budget(size), foreign=True))
    mapping = None if path is None else torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    return _of_sane_extent(_load_zip(file, allowed, _Budget(size), True, mapping))


def _parts(value) -> tuple | list:
    """The parts of a container that printing it would show."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, (list, tuple)) else list(value) if isinstance(value, (set, frozenset)) else ()


def _of_sane_extent(content):
    """Returns ``content`` after checking that printing any part of it takes bounded time.

    k pairs that each hold the one before twice have 2^k leaves, and error messages must be able to
    quote any value. Plain containers may not nest deeply or contain themselves. Each container is
    visited once.
    """
    extents: dict[int, tuple[int, int]] = {}  # of containers: (leaves, depth)
    roots, seen = [content], set()
    while roots:
        root = roots.pop()
        if isinstance(root, PersistentObject):  # only its name is printed, so its state is visited separately
            root = root.state
        if id(root) in extents:
            continue
        path = [[root, iter(_parts(root)), 1, 0]]  # open containers: value, remaining parts, leaves, depth
        open_now = {id(root)}
        while path:
            value, parts, leaves, depth = path[-1]
            for part in parts:
                known = extents.get(id(part))
                if known is not None:
                    leaves, depth = leaves + known[0], max(depth, known[1])
                elif isinstance(part, (dict, list, tuple, set, frozenset)):
                    _require(id(part) not in open_now, "a container holds itself")
                    path[-1][2:] = leaves, depth
                    open_now.add(id(part))
                    path.append([part, iter(_parts(part)), 1, 0])
                    break
                else:
                    leaves += 1 + (len(part) // 16 if isinstance(part, (str, bytes)) else 0)
                    if isinstance(part, PersistentObject) and id(part) not in seen:
                        seen.add(id(part))
                        roots.append(part)
                sane = leaves <= _MOST_OBJECTS and depth < _DEEPEST
                _require(sane, "its containers are nested or shared without end")
            else:
                path.pop()
                open_now.discard(id(value))
                extents[id(value)] = leaves, depth + 1
                if path:
                    path[-1][2] += leaves
                    path[-1][3] = max(path[-1][3], depth + 1)
            _require(len(path) <= _DEEPEST, "its containers are nested or shared without end")
    return content


def _starts_like_zip(file) -> bool:
    start = file.tell()
    head = file.read(4)
    file.seek(start)
    return head == b"PK\x03\x04"


@contextlib.contextmanager
def open_binary(path_or_file):
    """Yields (seekable binary file, name for messages) of a path or an open file, or UserError."""
    if hasattr(path_or_file, "read"):
        name = str(getattr(path_or_file, "name", "the file"))
        seekable = getattr(path_or_file, "seekable", lambda: False)()
        yield (path_or_file if seekable else io.BytesIO(path_or_file.read())), name
        return
    path = Path(path_or_file)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    with file:
        yield file, str(path)


def safe_load(path_or_file):
    """The content of a pickle or ``torch.save`` file as data.

    Returns dicts, lists, numbers, strings, tensors on the CPU, and ``PersistentObject`` records
    instead of instances. Functions of ``solvers_amed`` are returned as their names.

    path_or_file: a path, or a binary file object, read from its current position.

    Raises UnsafePickleError (a UserError) for a file that needs more than data or is damaged.
    """
    with open_binary(path_or_file) as (file, name), _one_line_errors(name, file):
        return _load(file)


def safe_load_checkpoint(path_or_file):
    """The content of a ``torch.save`` file with objects of unknown classes (PyTorch-Lightning).

    As ``safe_load``, but an unknown global becomes a ``ForeignName``, and an object made with it a
    ``PersistentObject``; neither is imported or called. Given a path, tensors of the zip format are
    views of the mapped file.
    """
    with open_binary(path_or_file) as (file, name), _one_line_errors(name, file):
        return _load_tolerant(file, None if file is path_or_file else name)


@contextlib.contextmanager
def _one_line_errors(name: str, file):
    try:
        yield
    except UnsafePickleError as error:
        if file_kind(file):  # not an attack
            raise UnsafePickleError(
                f"{name} is not a readable pickle or torch.save file ({explain(file, error)})"
            ) from None
        raise UnsafePickleError(f"{name} was refused, nothing in it was run: {error}") from None
    except Exception as error:  # a damaged stream may raise anything
        plain = type(error) is ValueError or isinstance(error, zipfile.BadZipFile)
        reason = explain(file, (f"{error}" if plain else f"{type(error).__name__}: {error}")[:200])
        raise UnsafePickleError(f"{name} is not a readable pickle or torch.save file ({reason})") from None
