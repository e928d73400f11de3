"""Networks that turn images into features for the Fréchet distance.

inception   Inception-v3 as in Heusel et al. 2017 and EDM; 2048 features of images of any size.
            NVIDIA's TorchScript port (checked by its SHA-256), or if that cannot be downloaded the
            published state dict in evaluation/inception.py. Kept in a cache folder.
digits, cifar10-small
            embedded small classifiers of 32x32 images, 64 features each. Their distances are not
            comparable with Inception FIDs.
PATH        a TorchScript file (.pt), an Inception state dict (.pth), or a classifier from
            tools/train_classifier.py (.safetensors)
"""

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from evaluation.inception import FEATURE_DIM, load_inception
from models.building import build_empty, load_weights
from models.zoo import PRETRAINED
from torch_utils.download import download_file
from torch_utils.errors import UserError
from torch_utils.file_kind import explain
from torch_utils.files import atomic_path, sha256_of
from torch_utils.remote import cache_dir
from torch_utils.tensor_file import json_entry

CLASSIFIER_FORMAT = "amed-classifier-1"

# Classifiers in this repository, named after the network with the same kind of images.
EMBEDDED = {"digits": "digits-features.safetensors", "cifar10-small": "cifar10-small-features.safetensors"}
KNOWN = ("inception", *EMBEDDED)

_INCEPTION_FILE = "inception-2015-12-05.pt"
_INCEPTION_URLS = ["https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"]
_INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
# TorchScript is a program: only files with these digests are run without --trust.
TRUSTED_TORCHSCRIPT = {_INCEPTION_SHA256: "inception"}

# One file under two names, which contain the first digits of its SHA-256.
_STATE_FILE = "pt_inception-2015-12-05-6726825d.pth"
_STATE_URLS = [
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_STATE_FILE}",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
]
_STATE_SHA256_PREFIX = "6726825d"


def is_published_inception(digest: str) -> bool:
    """Whether this is the SHA-256 of a published copy of Inception; all give the same features."""
    return digest in TRUSTED_TORCHSCRIPT or digest.startswith(_STATE_SHA256_PREFIX)


class _Classifier(torch.nn.Module):
    """Base class; ``config`` has the constructor arguments, which are stored with the weights."""

    def __init__(self, img_channels: int, img_resolution: int, num_classes: int, feature_dim: int, width: int):
        super().__init__()
        self.config = {
            "img_channels": img_channels,
            "img_resolution": img_resolution,
            "num_classes": num_classes,
            "feature_dim": feature_dim,
            "width": width,
        }


class ConvClassifier(_Classifier):
    """A small convolutional classifier. ``forward``: images [B,C,R,R] in [0, 1] -> logits.

    ``features`` [B, feature_dim] are pooled before the last, linear layer.

    img_channels, img_resolution: C and R.
    num_classes: number of logits.
    feature_dim: number of features. Default 64.
    width: channels of the first layer. Default 16.
    """

    def __init__(self, img_channels: int, img_resolution: int, num_classes: int, feature_dim=64, width=16):
        super().__init__(img_channels, img_resolution, num_classes, feature_dim, width)
        plan = [(img_channels, width, 2), (width, 2 * width, 2), (2 * width, 4 * width, 1), (4 * width, feature_dim, 1)]
        layers = []
        for channels_in, channels_out, stride in plan:
            layers.append(torch.nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False))
            layers.append(torch.nn.BatchNorm2d(channels_out))
            layers.append(torch.nn.ReLU(inplace=True))
        self.body = torch.nn.Sequential(*layers)
        self.head = torch.nn.Linear(feature_dim, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class _ResidualBlock(torch.nn.Module):
    """x + two normalised 3x3 convolutions; the first one has the stride."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.norm1 = torch.nn.GroupNorm(4, channels_in)
        self.conv1 = torch.nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)
        self.norm2 = torch.nn.GroupNorm(4, channels_out)
        self.conv2 = torch.nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = torch.nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class ResidualClassifier(_Classifier):
    """A classifier with residual blocks, to check results of the other one.

    Its features are a linear map of pooled ones, so they have both signs. Arguments as in
    ``ConvClassifier``; width is a multiple of 4.
    """

    def __init__(self, img_channels: int, img_resolution: int, num_classes: int, feature_dim=64, width=16):
        super().__init__(img_channels, img_resolution, num_classes, feature_dim, width)
        if width % 4:
            raise UserError(f"width={width}: must be a multiple of 4")
        self.stem = torch.nn.Conv2d(img_channels, width, 5, stride=2, padding=2)
        plan = [(width, 2 * width, 1), (2 * width, 4 * width, 2), (4 * width, 4 * width, 1)]
        self.blocks = torch.nn.Sequential(*(_ResidualBlock(*sizes) for sizes in plan))
        self.embed = torch.nn.Linear(4 * width, feature_dim)
        self.head = torch.nn.Linear(feature_dim, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.embed(F.silu(self.blocks(self.stem(images))).mean(dim=(2, 3)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(F.silu(self.features(images)))


ARCHITECTURES = {"conv": ConvClassifier, "residual": ResidualClassifier}


def save_classifier(model: torch.nn.Module, path: str | Path, **provenance) -> None:
    """Write a safetensors file; ``provenance`` (accuracy, seed, ...) becomes metadata."""
    architecture = next(name for name, kind in ARCHITECTURES.items() if type(model) is kind)
    metadata = {"format": CLASSIFIER_FORMAT, "architecture": architecture, "config": json.dumps(model.config)}
    metadata.update({key: str(value) for key, value in provenance.items()})
    with atomic_path(path) as temporary:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, temporary, metadata=metadata)


def load_classifier(path: str | Path) -> tuple[torch.nn.Module, dict[str, str]]:
    """Load (classifier in evaluation mode, metadata of the file). UserError if it is unusable."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != CLASSIFIER_FORMAT:
                raise UserError(f"{path}: not a classifier from tools/train_classifier.py")
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
        config = json_entry(metadata, "config", str(path))
        if not all(type(value) is int and 0 < value < 1 << 20 for value in config.values()):
            raise UserError(f"{path}: not a usable classifier file (its sizes are not whole numbers)")
        architecture = metadata.get("architecture", "conv")  # missing in older files
        if architecture not in ARCHITECTURES:
            raise UserError(f"{path}: unknown architecture '{architecture[:40]}'; known: {', '.join(ARCHITECTURES)}")
        model = build_empty(ARCHITECTURES[architecture], config, "a classifier", len(state))
        load_weights(model, state, "cpu")
    except (SafetensorError, OSError) as exc:
        raise UserError(f"{path}: not a usable classifier file ({explain(path, exc)})") from None
    except UserError as exc:
        raise UserError(f"{path}: not a usable classifier file ({str(exc).removeprefix(f'{path}: ')})") from None
    return model.eval().requires_grad_(False), metadata


class FeatureDetector:
    """Base class: uint8 images [B,C,H,W] -> float32 features [B, feature_dim].

    name: name in results.
    file, digest: name and SHA-256 of the weights file.
    feature_dim: number of features.
    img_channels, img_resolution: required shape of images; None: any.
    """

    name: str
    file: str
    digest: str
    feature_dim: int
    img_channels: int | None = None
    img_resolution: int | None = None

    def check(self, shape: tuple[int, int, int], where: str) -> None:
        """Raises UserError for images of a wrong ``shape`` (C, H, W); ``where``: their name."""
        channels, height, width = shape
        size = self.img_resolution
        if size is not None and (height, width) != (size, size):
            raise UserError(
                f"{where}: {width}x{height} pixels, but the detector '{self.name}' takes {size}x{size}; resize the"
                " images with tools/dataset_tool.py or choose another --detector"
            )
        if self.img_channels is not None and channels != self.img_channels:
            kind = {1: "grey-scale", 3: "RGB"}
            raise UserError(
                f"{where}: {kind.get(channels, channels)} image, but the detector '{self.name}' takes"
                f" {kind.get(self.img_channels, self.img_channels)} ones"
            )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"expected uint8 images [B,C,H,W], got {images.dtype} {list(images.shape)}")
        self.check(tuple(images.shape[1:]), "images")
        with torch.inference_mode():
            return self._features(images).float()

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _on(device: torch.device, images: torch.Tensor) -> torch.Tensor:
    """Copy images to the device; from pinned memory without waiting for it."""
    return images.to(device, non_blocking=device.type == "cuda" and images.is_pinned())


class ClassifierDetector(FeatureDetector):
    """The pooled features of a classifier file."""

    def __init__(self, path: Path, device: torch.device, name: str | None = None):
        self.file, self.digest = path.name, sha256_of(path)
        self.name = name or f"{path.stem}-{self.digest[:8]}"
        model, _ = load_classifier(path)
        self._model = model.to(device)
        self._device = device
        self.feature_dim = model.config["feature_dim"]
        self.img_channels = model.config["img_channels"]
        self.img_resolution = model.config["img_resolution"]

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self._model.features(_on(self._device, images).float() / 255)


class TorchScriptDetector(FeatureDetector):
    """A TorchScript network for RGB images in 0..255; grey images are repeated to three channels.

    If the network has the argument ``return_features``, it is True: Inception then returns its 2048
    pooled features.
    """

    def __init__(self, path: Path, device: torch.device, name: str | None = None):
        self.file, self.digest = path.name, sha256_of(path)
        self.name = name or f"{path.stem}-{self.digest[:8]}"
        self._device = device
        try:
            self._model = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as exc:
            raise UserError(f"{path}: not a TorchScript file ({str(exc).splitlines()[0]})") from None
        arguments = [argument.name for argument in self._model.forward.schema.arguments]
        self._options = {"return_features": True} if "return_features" in arguments else {}
        with torch.inference_mode():
            probe = self._features(torch.zeros([2, 3, 64, 64], dtype=torch.uint8))
        if probe.ndim != 2 or len(probe) != 2:
            raise UserError(f"{path}: gives {list(probe.shape)} for two images; expected features [2, D]")
        self.feature_dim = probe.shape[1]

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] == 1:
            images = images.repeat([1, 3, 1, 1])
        # The rounding of TF32 depends on the batch size.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            return self._model(_on(self._device, images), **self._options)


class InceptionDetector(FeatureDetector):
    """Inception-v3 of evaluation/inception.py; grey images are repeated to three channels."""

    feature_dim = FEATURE_DIM

    def __init__(self, path: Path, device: torch.device):
        self.file, self.digest = path.name, sha256_of(path)
        self.name = "inception" if is_published_inception(self.digest) else f"{path.stem}-{self.digest[:8]}"
        self._device = device
        self._model = load_inception(path).to(device)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        images = _on(self._device, images)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=False):
            return self._model(images.expand(-1, 3, -1, -1))


def _download_state(dest: Path) -> Path:
    """Download the state dict to dest. It gets this name only after its SHA-256 was checked."""
    if dest.exists():
        if not sha256_of(dest).startswith(_STATE_SHA256_PREFIX):
            raise UserError(
                f"{dest}: its SHA-256 does not begin with {_STATE_SHA256_PREFIX}: move it away to download it again"
            )
        return dest
    unchecked = dest.with_name(f"{dest.name}.unchecked")
    reasons = []
    for url in _STATE_URLS:
        try:
            download_file([url], unchecked, desc="Inception-v3 (state dict)", hint="pass --detector=PATH")
        except UserError as exc:
            reasons.append(str(exc).replace(str(unchecked), str(dest)))
            continue
        if sha256_of(unchecked).startswith(_STATE_SHA256_PREFIX):
            os.replace(unchecked, dest)
            return dest
        unchecked.unlink()
        reasons.append(f"{url}: its SHA-256 does not begin with {_STATE_SHA256_PREFIX}")
    raise UserError("; ".join(reasons))


def _load_inception(device: torch.device) -> FeatureDetector:
    """Inception from the cache, TorchScript first; else from a download, in the same order."""
    script, state = cache_dir() / _INCEPTION_FILE, cache_dir() / _STATE_FILE
    if not script.exists() and state.exists():
        return InceptionDetector(_download_state(state), device)
    try:
        download_file(
            _INCEPTION_URLS, script, sha256=_INCEPTION_SHA256, desc="Inception-v3", hint="pass --detector=PATH"
        )
    except UserError as exc:
        if script.exists():  # another file has this name
            raise
        try:
            return InceptionDetector(_download_state(state), device)
        except UserError as second:
            raise UserError(f"{exc}; its state dict cannot be used either: {second}") from None
    return TorchScriptDetector(script, device, name="inception")


def load_detector(name_or_path: str | Path, device: torch.device | str = "cpu", trust: bool = False) -> FeatureDetector:
    """Load a feature detector.

    name_or_path: a name in KNOWN, or the path of a TorchScript file (.pt), an Inception state dict
        (.pth) or a classifier (.safetensors).
    device: where it runs. Default: the CPU.
    trust: run a TorchScript file of unknown SHA-256; it is a program. Default False.

    Under torchrun use ``distributed.local_main_first()``, because this may download. Raises
    UserError for unknown names and unusable files.
    """
    device = torch.device(device)
    if name_or_path == "inception":
        return _load_inception(device)
    if name_or_path in EMBEDDED:
        return ClassifierDetector(PRETRAINED / EMBEDDED[name_or_path], device, name=name_or_path)
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(
            f"--detector={name_or_path}: neither a known detector ({', '.join(KNOWN)}) nor a file; choose one"
        )
    if path.suffix == ".safetensors":
        return ClassifierDetector(path, device)
    if path.suffix == ".pth":
        return InceptionDetector(path, device)
    if path.suffix != ".pt":
        raise UserError(
            f"--detector={path}: expected TorchScript (.pt), an Inception state dict (.pth) or a classifier"
            " (.safetensors); pickled networks contain code and are not read"
        )
    if kind := explain(path, ""):
        raise UserError(f"{path}: not a TorchScript file ({kind})")
    digest = sha256_of(path)
    if digest not in TRUSTED_TORCHSCRIPT and not trust:
        raise UserError(
            f"--detector={path}: unknown TorchScript file (SHA-256 {digest[:16]}...). TorchScript is a program; if you"
            " trust its source, add --trust=True"
        )
    return TorchScriptDetector(path, device, name=TRUSTED_TORCHSCRIPT.get(digest))
