"""What people get in place of weights is named as what it is, by every loader, in one line."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from evaluation.detectors import load_detector
from evaluation.frechet import Reference
from models.edm import load_edm_network
from solvers.schedule_file import load_schedule
from torch_utils.arrays import npz_names, read_npz
from torch_utils.errors import UserError
from torch_utils.file_kind import file_kind
from torch_utils.safe_pickle import safe_load, safe_load_checkpoint
from torch_utils.tensor_file import read_weights
from training.checkpoint import load_predictor

# As https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md has it.
LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
LOGIN = (
    b'\n<!DOCTYPE html>\n<html lang="en"><head><title>Sign in \xe2\x80\x93 a site</title></head><body></body></html>'
)
BUCKET = (  # of S3
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied</Message>'
    b"<RequestId>1</RequestId></Error>"
)
STATE = {"weight": torch.arange(1000.0)}


def archive(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, content in members:
            target.writestr(name, content)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as target:
        target.addfile(tarfile.TarInfo("model.ckpt"))
    return file.getvalue()


def written(write) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


WEIGHTS = safetensors.torch.save(STATE)
TORCH = written(lambda file: torch.save(STATE, file))
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.4.0:\x10\x0a\x05" + bytes(8)
FLAX = b"\x81\xa6params\x82\xa4bias\xc7" + bytes(range(200))

FILES = {
    "LFS": (LFS, "a Git LFS pointer to a file of 12345 bytes, not that file: run 'git lfs pull'"),
    "LFS, Windows": (LFS.replace(b"\n", b"\r\n"), "a Git LFS pointer to a file of 12345 bytes"),
    "login": (LOGIN, "a web page ('Sign in – a site')"),
    "page": (b"<!-- x -->\n<HTML><body>\xff" + b"x" * 100_000, "a web page, such as a login or an error"),
    "bucket": (BUCKET, "the error of a server (AccessDenied) in XML"),
    "Azure": (b"\xef\xbb\xbf" + BUCKET.replace(b"AccessDenied", b"BlobNotFound"), "the error of a server (BlobNotFound)"),
    "XML": (b"<?xml version='1.0'?>\n<net name='model'/>", "an XML file"),
    "text": (b"Entry not found", "a text file ('Entry not found')"),
    "sentence": (b"Access to model a/b is restricted. Please log in.", "a text file ('Access to model a/b is"),
    "hostile text": (b"Not\x1b[31m red\n", None),
    "JSON error": (b'{"error":"Invalid \\u001b[1m token"}', "the error of a server ('\"Invalid \\u001b[1m token\"') in JSON"),
    "JSON": (b'{"_class_name": "UNet2DModel"}', "a JSON file"),
    "index": (json.dumps({"metadata": {}, "weight_map": {}}).encode(), "the index of weights in several files"),
    "PowerShell": ("<html>".encode("utf-16"), "text in UTF-16, as '>' of PowerShell writes it"),
    "empty": (b"", "empty: download or copy it again"),
    "zeros": (bytes(100_000), "full of zeros"),
    "gzip": (gzip.compress(TORCH), "compressed with gzip: unpack it first"),
    "bzip2": (bz2.compress(TORCH), "compressed with bzip2"),
    "xz": (lzma.compress(TORCH), "compressed with xz"),
    "tar": (tar(), "a tar archive"),
    "folder": (
        archive(("digits/model_index.json", b"{}"), ("digits/unet/\x1b[1m.bin", b"1"), ("a", b""), ("b", b"")),
        "a zip archive (digits/model_index.json, digits/unet/ [1m.bin, a, ...), but not one written by torch.save",
    ),
    "no files": (archive(), "a zip archive (empty)"),
    "npz": (written(lambda file: np.savez(file, mu=np.zeros(3))), "a NumPy archive (.npz) of mu.npy"),
    "npy": (written(lambda file: np.save(file, np.zeros(3))), "a NumPy array (.npy)"),
    "PNG": (written(lambda file: Image.new("L", (4, 4)).save(file, "PNG")), "a PNG image"),
    "JPEG": (written(lambda file: Image.new("L", (4, 4)).save(file, "JPEG")), "a JPEG image"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file (.h5, .keras)"),
    "ONNX": (ONNX, "an ONNX file"),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3" + bytes(100), "a TensorFlow Lite file"),
    "TensorFlow": (b"\0\0\x0a" * 90 + bytes.fromhex("57fb808b247547db"), "the index of a TensorFlow checkpoint"),
    "Flax": (FLAX, "a MessagePack file of Flax"),
    "AppleDouble": (b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(50), "an AppleDouble file of macOS"),
    "half of torch.save": (TORCH[: len(TORCH) // 2], "truncated: it lacks its end; download"),
    "half of safetensors": (WEIGHTS[:1000], f"truncated: it has 1000 of {len(WEIGHTS)} bytes"),
    "start of safetensors": (WEIGHTS[:20], "truncated: it has 20 of"),
}  # fmt: skip
FAULTY = [name for name, (_, kind) in FILES.items() if kind]


@pytest.fixture(params=FAULTY)
def case(request):
    return FILES[request.param]


def test_kinds(case):
    content, kind = case
    found = file_kind(io.BytesIO(content))
    assert found.startswith(kind) and found.isprintable()


@pytest.mark.parametrize(
    "load, suffix",
    [
        (load_edm_network, "pkl"),
        (read_weights, "ckpt"),
        (safe_load, "pkl"),
        (safe_load_checkpoint, "ckpt"),
        (load_predictor, "safetensors"),
        (lambda path: load_detector(path, trust=True), "pt"),
        (load_detector, "pth"),
        (load_detector, "safetensors"),
    ],
    ids=["network", "weights", "pickle", "checkpoint", "predictor", "detector", "inception", "classifier"],
)
def test_every_loader_names_them(case, load, suffix, tmp_path):
    content, kind = case
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(path)
    text = str(error.value)
    assert str(path) in text and f"is {kind}" in text and text.isprintable()


@pytest.mark.parametrize("load", [read_npz, npz_names, Reference.load, load_schedule])
@pytest.mark.parametrize("name", ["LFS", "login", "bucket", "empty", "gzip", "text", "PNG"])
def test_statistics_and_schedules(load, name, tmp_path):
    content, kind = FILES[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load(path)
    assert str(path) in str(error.value) and f"(it is {kind}" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        TORCH,
        written(lambda file: torch.save(STATE, file, _use_new_zipfile_serialization=False)),
        *(pickle.dumps({"ema": [1, 2.5, "text"]}, protocol) for protocol in range(6)),
        pickle.dumps(10**50, 0),
        b"cbuiltins\neval\n(S'1 + 1'\ntR.",
        FILES["hostile text"][0],
    ],
)
def test_weights_and_pickles_are_not_taken_for_something_else(content):
    assert file_kind(io.BytesIO(content)) is None


def test_a_pickle_that_is_refused_is_refused_for_what_it_asks():
    with pytest.raises(UserError, match="refused, nothing in it was run: .*eval"):
        safe_load(io.BytesIO(b"cbuiltins\neval\n(S'1 + 1'\ntR."))


def test_what_a_loader_reads_is_reported_by_its_own_faults(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(FILES["JSON"][0])
    with pytest.raises(UserError, match="is not a schedule file of this version"):
        load_schedule(path)
    path.write_bytes(b'{"format": ')
    with pytest.raises(UserError, match="is not a schedule file: not valid JSON"):
        load_schedule(path)
    path.write_bytes(FILES["npz"][0][:-30])
    with pytest.raises(UserError, match="not a readable npz file"):
        read_npz(path)
    path.write_bytes(FILES["folder"][0])
    assert npz_names(path) == []
