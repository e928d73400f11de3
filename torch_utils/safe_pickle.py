"""Reading pickled networks without running anything that is in the file.

Official EDM networks and the snapshots of the original AMED code are pickles that carry Python source and execute it
when they are loaded with ``pickle``. Here a file is data only: a small unpickler knows a handful of exact global names,
maps each to a function of this module, and refuses every other name. Objects come back as inert ``PersistentObject``
records, from which the caller rebuilds its own classes. Three containers are understood: a plain pickle, and both
formats of ``torch.save``.

PyTorch-Lightning checkpoints hold objects of arbitrary classes beside the weights. For them there is a second mode in
which an unknown name is not refused but becomes a record of the name, and whatever is made from it an empty or inert
record: nothing is imported or called in this mode either.
"""

import contextlib
import io
import math
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from torch_utils.errors import UserError
from torch_utils.file_kind import explain, file_kind

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first value of a file in the older torch.save format
_LEGACY_PROTOCOL = 1001
_MAX_DEPTH = 32  # of nested modules
_MAX_TENSORS = 100_000
_MOST_PARTS = 5_000_000  # of a plain container, with all that is in it
_DEEPEST = 200  # plain containers in each other


class UnsafePickleError(UserError, pickle.UnpicklingError):
    """The file asks for something that plain data does not need, or is damaged. Nothing of it has been executed."""


# ----------------------------------------------------------------------------------------------------------------------
# What comes out


@dataclass(frozen=True, eq=False, repr=False)
class PersistentObject:
    """An object of the file as inert data: the name of its class and its instance dictionary.

    Objects of ``torch_utils.persistence`` have the bare class name ("EDMPrecond"); plain torch modules have the full
    one ("torch.nn.modules.container.ModuleDict").
    """

    class_name: str
    state: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"PersistentObject({self.class_name})"

    @property
    def init_kwargs(self) -> dict:
        """The keyword arguments the object was constructed with."""
        kwargs = self.state.get("_init_kwargs")
        if not isinstance(kwargs, dict) or not all(isinstance(key, str) for key in kwargs):
            raise UserError(f"the stored {self.class_name} does not say how it was constructed (_init_kwargs)")
        return dict(kwargs)

    @property
    def attributes(self) -> dict:
        """The public instance attributes."""
        return {k: v for k, v in self.state.items() if isinstance(k, str) and not k.startswith("_")}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers under their dotted names, as ``torch.nn.Module.state_dict`` gives them."""
        tensors: dict[str, torch.Tensor] = {}
        self._collect(tensors, [], "", _MAX_DEPTH)
        return tensors

    def _part(self, name: str) -> dict:
        part = self.state.get(name)
        if not isinstance(part, dict):
            raise UserError(f"the stored {self.class_name} is not a network: it has no {name}")
        return part

    def _collect(self, tensors: dict, modules: list, prefix: str, depth: int) -> None:
        modules.append(prefix)
        if len(modules) > _MAX_TENSORS:  # modules that share modules need few bytes for many names
            raise UserError(f"the stored {self.class_name} is damaged: it has too many modules")
        skipped = self.state.get("_non_persistent_buffers_set") or ()
        buffers = {name: value for name, value in self._part("_buffers").items() if name not in skipped}
        for name, value in [*self._part("_parameters").items(), *buffers.items()]:
            if value is None:
                continue
            if not isinstance(value, torch.Tensor) or len(tensors) >= _MAX_TENSORS:
                raise UserError(f"the stored {self.class_name} is damaged at '{prefix}{name}'")
            tensors[f"{prefix}{name}"] = value
        for name, value in self._part("_modules").items():
            if value is None:
                continue
            if not isinstance(value, PersistentObject) or depth == 0:
                raise UserError(f"the stored {self.class_name} is damaged at '{prefix}{name}'")
            value._collect(tensors, modules, f"{prefix}{name}.", depth - 1)


@dataclass(frozen=True, eq=False)
class ForeignName:
    """A global of the file that this code knows nothing about, as its dotted name."""

    name: str


# ----------------------------------------------------------------------------------------------------------------------
# What the globals of a file are mapped to. None of these is a function or class that the file could reconfigure: the
# unpickler below calls a _Builder and instantiates a _PlainModule itself, and knows no other use of a global.


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


def _require(condition, message: str) -> None:
    if not condition:
        raise UnsafePickleError(message)


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


def _check_keys(keys) -> None:
    # Hashing a deeply nested tuple can exhaust the C stack, and real files need only simple keys.
    for key in keys:
        _require(key is None or type(key) in (str, int, float, bool), f"a {type(key).__name__} serves as a key")


def _build_persistent(meta=None) -> PersistentObject:
    """The record of one object; its ``module_src`` (Python source) is dropped unread."""
    _require(isinstance(meta, dict) and meta.get("type") == "class", "a persistent object is not a class instance")
    _require(meta.get("version") == 6, "a persistent object is not of version 6, the only one known")
    name, state = meta.get("class_name"), meta.get("state")
    _require(isinstance(name, str) and isinstance(state, dict), "a persistent object has no class name or no state")
    return PersistentObject(name, state)


def _build_ordered_dict(pairs=()) -> OrderedDict:
    _require(isinstance(pairs, (list, tuple)), "an OrderedDict is built from something else than pairs")
    _require(all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs), "an OrderedDict is not built from pairs")
    _check_keys(key for key, _ in pairs)
    return OrderedDict((key, value) for key, value in pairs)


def _build_set(items=()) -> set:
    _require(isinstance(items, (list, tuple)), "a set is built from something else than a list")
    _check_keys(items)
    return set(items)


def _build_bytes(text, encoding) -> bytes:
    """Bytes as pickle protocol 2 spells them."""
    _require(isinstance(text, str) and encoding == "latin1", "bytes are encoded in an unknown way")
    return text.encode("latin1")


def _build_numpy_type(code, *flags) -> _NumpyType:
    _require(code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"), "a numpy type is not a plain number")
    return _NumpyType(code)


def _build_numpy_scalar(kind, data) -> float | int | bool:
    _require(isinstance(kind, _NumpyType) and isinstance(data, bytes), "a numpy scalar is malformed")
    dtype = np.dtype(kind.order + kind.code)
    _require(len(data) == dtype.itemsize, "a numpy scalar has the wrong size")
    return np.frombuffer(data, dtype)[0].item()


def _build_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> torch.Tensor:
    """A view of the storage, after checking that it lies inside and has no more elements."""
    _require(isinstance(storage, _Storage), "a tensor has no storage")
    _require(isinstance(size, tuple) and isinstance(stride, tuple), "a tensor has no shape")
    _require(len(size) == len(stride) <= 16, "a tensor's size and stride do not belong together")
    _require(all(map(_is_count, (offset, *size, *stride))), "a tensor's shape is not made of counts")
    numel = storage.flat.numel()
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else offset - 1
    _require(last < numel and math.prod(size) <= numel, "a tensor reaches beyond its storage")
    return storage.flat.as_strided(size, stride, storage.flat.storage_offset() + offset)


def _build_parameter(data, requires_grad=False, hooks=None) -> torch.Tensor:
    _require(isinstance(data, torch.Tensor), "a parameter is not a tensor")
    return data


def _build_storage(data) -> _Storage:
    """A nested storage: a file of the older torch.save of its own, in which nothing but storages may be named."""
    _require(isinstance(data, bytes), "a nested storage is not bytes")
    storage = _load_legacy(_Source(io.BytesIO(data)), _STORAGE_GLOBALS)
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

# What a state dict is made of. In files with foreign objects everything else, numpy included, is foreign.
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


# ----------------------------------------------------------------------------------------------------------------------
# The unpickler

_PLAIN_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.INT, pickle.LONG, pickle.FLOAT, pickle.STRING, pickle.UNICODE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.BINFLOAT),
    *(pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8),
    *(pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT, pickle.EMPTY_SET, pickle.LIST),
    *(pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
)


class _SafeUnpickler(pickle._Unpickler):
    """The unpickler of the standard library, cut down.

    The pure Python version is the base because every opcode that calls, instantiates or modifies an object is replaced:
    otherwise an allowed object could be reconfigured through BUILD, SETITEM or ADDITEMS.
    """

    def __init__(self, source, allowed: dict, persistent_load=None):
        super().__init__(source, encoding="latin1")
        self._allowed = allowed
        self._persistent_load = persistent_load

    def load(self):
        try:
            return super().load()
        except KeyError as error:
            raise UnsafePickleError(f"it uses the pickle instruction {error}, which plain data does not need") from None

    def find_class(self, module, name):
        try:
            return self._allowed[module, name]
        except KeyError:
            wanted = f"{module}.{name}"[:200]
            raise UnsafePickleError(f"it asks for the global '{wanted}', which is not on the safe list") from None

    def persistent_load(self, pid):
        _require(self._persistent_load is not None, "it refers to data outside the stream")
        return self._persistent_load(pid)

    def _op_inst(self):
        module, name = (self.readline()[:-1].decode("utf-8", "replace") for _ in range(2))
        self.find_class(module, name)
        raise UnsafePickleError(f"it instantiates '{module}.{name}' in an unknown way")

    def _op_reduce(self):
        args, builder = self.stack.pop(), self.stack.pop()
        _require(isinstance(builder, _Builder) and isinstance(args, tuple), "it calls something that is not a builder")
        self.append(builder.function(*args))

    def _op_newobj(self):
        args, kind = self.stack.pop(), self.stack.pop()
        _require(isinstance(kind, _PlainModule) and args == (), "it instantiates something that is not a known module")
        self.append(PersistentObject(kind.name))

    def _op_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PersistentObject) and not target.state and isinstance(state, dict):
            target.state.update(state)
        elif isinstance(target, _NumpyType):
            good = isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|")
            _require(good, "a numpy type has an unknown byte order")
            target.order = state[1]
        elif not isinstance(target, OrderedDict):  # the attributes of an OrderedDict (version notes) carry no data
            raise UnsafePickleError(f"it sets the state of a {type(target).__name__}")

    def _check_keys(self, keys):
        _check_keys(keys)

    def _set_items(self, items):
        _require(isinstance(self.stack[-1], dict), "it sets items of something that is not a dictionary")
        self._check_keys(items[::2])
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _op_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _op_setitems(self):
        self._set_items(self.pop_mark())

    def _op_dict(self):
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _op_append(self):
        value = self.stack.pop()
        self._extend(list, [value])

    def _op_appends(self):
        self._extend(list, self.pop_mark())

    def _op_additems(self):
        items = self.pop_mark()
        self._check_keys(items)
        self._extend(set, items)

    def _extend(self, kind, items):
        _require(type(self.stack[-1]) is kind, f"it extends something that is not a {kind.__name__}")
        self.stack[-1].extend(items) if kind is list else self.stack[-1].update(items)

    def _op_frozenset(self):
        items = self.pop_mark()
        self._check_keys(items)
        self.append(frozenset(items))

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _PLAIN_OPCODES} | {
        pickle.INST[0]: _op_inst,
        pickle.REDUCE[0]: _op_reduce,
        pickle.NEWOBJ[0]: _op_newobj,
        pickle.BUILD[0]: _op_build,
        pickle.SETITEM[0]: _op_setitem,
        pickle.SETITEMS[0]: _op_setitems,
        pickle.DICT[0]: _op_dict,
        pickle.APPEND[0]: _op_append,
        pickle.APPENDS[0]: _op_appends,
        pickle.ADDITEMS[0]: _op_additems,
        pickle.FROZENSET[0]: _op_frozenset,
    }


class _TolerantUnpickler(_SafeUnpickler):
    """The same, except that an unknown name gives a ForeignName, and what the file makes from one a PersistentObject.

    Calls, arguments and items of foreign objects are dropped; a first dictionary of attributes is kept, as data.
    """

    def find_class(self, module, name):
        return self._allowed.get((module, name)) or ForeignName(f"{module}.{name}"[:200])

    def _replace_call(self, arguments: int) -> bool:
        """Puts a record in the place of a foreign callable and its arguments."""
        foreign = isinstance(self.stack[-1 - arguments], ForeignName)
        if foreign:
            del self.stack[-arguments:]
            self.append(PersistentObject(self.stack.pop().name))
        return foreign

    def _op_reduce(self):
        if not self._replace_call(1):
            super()._op_reduce()

    def _op_newobj(self):
        if not self._replace_call(1):
            super()._op_newobj()

    def _op_newobj_ex(self):
        _require(self._replace_call(2), "it instantiates something that is not a known module")

    def _op_build(self):
        target = self.stack[-2]
        if isinstance(target, PersistentObject) and (target.state or not isinstance(self.stack[-1], dict)):
            self.stack.pop()  # the state of a class with its own idea of one
        else:
            super()._op_build()

    def _check_keys(self, keys):
        parts = [part for key in keys for part in (key if type(key) is tuple else (key,))]
        _check_keys(part for part in parts if not isinstance(part, (ForeignName, PersistentObject)))

    def _set_items(self, items):
        if not isinstance(self.stack[-1], PersistentObject):
            super()._set_items(items)

    def _extend(self, kind, items):
        if not isinstance(self.stack[-1], PersistentObject):
            super()._extend(kind, items)

    dispatch = _SafeUnpickler.dispatch | {
        pickle.REDUCE[0]: _op_reduce,
        pickle.NEWOBJ[0]: _op_newobj,
        pickle.NEWOBJ_EX[0]: _op_newobj_ex,
        pickle.BUILD[0]: _op_build,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Containers


class _Source:
    """A seekable binary file that refuses to promise more bytes than it has."""

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


def _storage_id(pid) -> tuple[torch.dtype, str, int]:
    """(dtype, key, number of elements) of a reference to a storage in a file of torch.save."""
    _require(isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage", "it refers to unknown outside data")
    _, kind, key, _location, numel, *view = pid
    _require(isinstance(kind, _StorageType) and isinstance(key, str) and _is_count(numel), "a storage reference is bad")
    _require(view in ([], [None]), "it holds views of storages, which only very old versions of torch wrote")
    return kind.dtype, key, numel


def _load_legacy(source: _Source, allowed: dict, magic_read: bool = False, unpickler=_SafeUnpickler):
    """The older torch.save format: five pickles in a row, then the raw storages.

    Objects may refer only to storages; ``allowed`` applies to every pickle of the stream.
    """
    storages: dict[str, _Storage] = {}
    declared = 0

    def persistent_load(pid):
        nonlocal declared
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # of (class, source file, source)
        dtype, key, numel = _storage_id(pid)
        if key not in storages:
            declared += numel * dtype.itemsize
            _require(declared <= source.remaining(), "its tensors are larger than the file")
            storages[key] = _Storage(torch.empty(numel, dtype=dtype))
        flat = storages[key].flat
        _require(flat.dtype == dtype and flat.numel() == numel, f"storage {key} is described in two ways")
        return storages[key]

    def plain():
        return _SafeUnpickler(source, {}).load()

    _require(magic_read or plain() == _LEGACY_MAGIC, "it is not a file of torch.save")
    _require(plain() == _LEGACY_PROTOCOL, "it is a file of an unknown version of torch.save")
    system = plain()
    little = isinstance(system, dict) and system.get("little_endian") is True
    _require(little, "it was not written on a little-endian machine")
    result = unpickler(source, allowed, persistent_load).load()
    keys = plain()
    _require(isinstance(keys, list) and sorted(map(str, keys)) == sorted(storages), "its list of storages is damaged")
    for key in keys:
        flat = storages[key].flat
        _require(int.from_bytes(source.read(8), "little") == flat.numel(), f"storage {key} has the wrong size")
        _fill(flat, source.read(flat.numel() * flat.element_size()))
    return result


def _fill(flat: torch.Tensor, data: bytes) -> None:
    if flat.numel():
        flat.view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _map_member(mapping: torch.Tensor, file, info: zipfile.ZipInfo, dtype: torch.dtype) -> torch.Tensor:
    """The elements of an uncompressed part as a view of the mapped file (uint8)."""
    file.seek(info.header_offset)
    header = file.read(30)
    _require(header[:4] == b"PK\x03\x04" and len(header) == 30, f"the part {info.filename} is not where it should be")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    _require(start + info.file_size <= len(mapping), f"the part {info.filename} reaches beyond the file")
    part = mapping[start : start + info.file_size]
    return (part if start % dtype.itemsize == 0 else part.clone()).view(dtype)


def _load_zip(file, size: int, allowed: dict, unpickler=_SafeUnpickler, mapping: torch.Tensor | None = None):
    """The zip format of torch.save: the object in ``*/data.pkl``, storages in ``*/data/<key>``, nothing compressed.

    mapping: the mapped file (uint8 [size]), of which the tensors are then views.
    """
    with zipfile.ZipFile(file) as archive:
        main = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        _require(len(main) == 1, "it is a zip file, but not one written by torch.save")
        prefix = main[0].removesuffix("data.pkl")
        budget = size

        def locate(name: str) -> zipfile.ZipInfo:
            nonlocal budget
            _require(name in archive.NameToInfo, f"the part {name} is missing")
            info = archive.getinfo(name)
            stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            _require(stored, f"the part {name} is compressed; torch.save never does that")
            budget -= info.file_size
            _require(budget >= 0, "its parts are larger than the file")
            return info

        def member(name: str) -> bytes:
            return archive.read(locate(name))

        if f"{prefix}byteorder" in archive.NameToInfo:
            _require(member(f"{prefix}byteorder") == b"little", "it was not written on a little-endian machine")
        storages: dict[str, _Storage] = {}

        def persistent_load(pid):
            dtype, key, numel = _storage_id(pid)
            if key not in storages:
                info = locate(f"{prefix}data/{key}")
                _require(info.file_size == numel * dtype.itemsize, f"storage {key[:40]} has the wrong size")
                if mapping is not None:
                    storages[key] = _Storage(_map_member(mapping, file, info, dtype))
                else:
                    storages[key] = _Storage(torch.empty(numel, dtype=dtype))
                    _fill(storages[key].flat, archive.read(info))
            flat = storages[key].flat
            _require(flat.dtype == dtype and flat.numel() == numel, f"storage {key[:40]} is described in two ways")
            return storages[key]

        source = _Source(io.BytesIO(member(main[0])))
        return unpickler(source, allowed, persistent_load).load()


def _load(file):
    source = _Source(file)
    allowed = _OBJECT_GLOBALS | _STORAGE_GLOBALS
    if _starts_like_zip(file):
        return _of_sane_extent(_load_zip(file, source.remaining(), allowed))
    result = _SafeUnpickler(source, _OBJECT_GLOBALS).load()
    if isinstance(result, int) and result == _LEGACY_MAGIC:
        result = _load_legacy(source, allowed, magic_read=True)
    return _of_sane_extent(result)


def _load_tolerant(file, path: str | None):
    source = _Source(file)
    allowed = _WEIGHT_GLOBALS | _STORAGE_GLOBALS
    if not _starts_like_zip(file):
        return _of_sane_extent(_load_legacy(source, allowed, unpickler=_TolerantUnpickler))
    size = source.remaining()
    mapping = None if path is None else torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
    return _of_sane_extent(_load_zip(file, size, allowed, _TolerantUnpickler, mapping))


def _parts(value) -> list:
    """What a container holds, as far as printing it would show."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else []


def _of_sane_extent(content):
    """``content``, unless printing a part of it could take forever: k pairs that each hold the one before twice have 2^k
    leaves. An error message must be able to quote any value. Nor may plain containers nest deeply, or hold themselves.
    """
    extents: dict[int, tuple[int, int]] = {}  # of containers: (leaves, depth)
    open_now: set[int] = set()
    roots = [content]
    while roots:
        stack = [roots.pop()]
        while stack:
            value = stack[-1]
            if id(value) in extents:
                stack.pop()
                continue
            if isinstance(value, PersistentObject):  # printed by its name alone, so a start of its own
                extents[id(value)] = (1, 0)
                roots.append(value.state)
                continue
            parts = _parts(value)
            todo = [part for part in parts if id(part) not in extents and (_parts(part) or _is_record(part))]
            if todo:
                _require(id(value) not in open_now, "a container holds itself, or too many others")
                open_now.add(id(value))
                stack.extend(todo)
                _require(len(stack) <= _MOST_PARTS, "it has too many parts")
                continue
            known = [extents.get(id(part), (1, 0)) for part in parts]
            leaves, depth = sum(n for n, _ in known), 1 + max((d for _, d in known), default=0)
            _require(leaves <= _MOST_PARTS and depth <= _DEEPEST, "its containers are nested or shared without end")
            extents[id(value)] = (leaves, depth)
            open_now.discard(id(value))
            stack.pop()
    return content


def _is_record(value) -> bool:
    return isinstance(value, PersistentObject)


def _starts_like_zip(file) -> bool:
    start = file.tell()
    head = file.read(4)
    file.seek(start)
    return head == b"PK\x03\x04"


@contextlib.contextmanager
def open_binary(path_or_file):
    """Yields (seekable binary file, name for messages) for a path or an open file; UserError where there is none."""
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
    """The content of a pickle or a ``torch.save`` file as data: dicts, lists, numbers, strings, tensors on the CPU, and
    ``PersistentObject`` records in place of instances; functions of ``solvers_amed`` come back as their names.

    path_or_file: a path, or a binary file object, read from its current position. Raises UnsafePickleError (a
    UserError) where the file asks for any other global, which the message names, or is damaged; UserError where it
    cannot be opened.
    """
    with open_binary(path_or_file) as (file, name), _one_line_errors(name, file):
        return _load(file)


def safe_load_checkpoint(path_or_file):
    """The content of a ``torch.save`` file with objects of unknown classes in it, such as a PyTorch-Lightning checkpoint.

    As ``safe_load``, but an unknown global comes back as a ``ForeignName``, and an object made with it as a
    ``PersistentObject``; neither is looked up, and no argument of theirs is used. Given a path, the tensors of the zip
    format are views of the memory-mapped file: pages are read when they are used, and changes stay private.
    """
    with open_binary(path_or_file) as (file, name), _one_line_errors(name, file):
        return _load_tolerant(file, None if file is path_or_file else name)


@contextlib.contextmanager
def _one_line_errors(name: str, file):
    try:
        yield
    except UnsafePickleError as error:
        if file_kind(file):  # which is no attack
            raise UnsafePickleError(
                f"{name} is not a readable pickle or torch.save file ({explain(file, error)})"
            ) from None
        raise UnsafePickleError(f"{name} was refused, nothing in it was run: {error}") from None
    except Exception as error:  # whatever a damaged stream provokes in the standard library or in torch
        reason = explain(file, f"{type(error).__name__}: {error}"[:200])
        raise UnsafePickleError(f"{name} is not a readable pickle or torch.save file ({reason})") from error
