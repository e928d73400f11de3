"""Inception-v3 of the Fréchet inception distance: the TensorFlow graph of 2015-12-05.

Szegedy et al. 2016 (arXiv 1512.00567) describe the network, Heusel et al. 2017 (arXiv 1706.08500)
the distance. The parameters have the names of the published conversion
``pt_inception-2015-12-05-6726825d.pth``: those of torchvision's ``inception_v3`` without its
auxiliary classifier, and with 1008 classes. The differences from torchvision's network are:

- the average pools of the blocks A and C, and of the first E, do not count the padding;
- the second E pools by maximum;
- images are resized to 299x299 as in TensorFlow 1 (source position = position * in / out, no
  half-pixel shift, no antialiasing) and scaled by (x - 128) / 128.

Verified with artificial weights: the features equal those of torch-fidelity 0.4.0 (resizing
included) and pytorch-fid 0.3.0, which load the published file under these names (relative
difference below 2e-6). Not verified: values with the published weights, and the whole SHA-256 of
their file. Its first 8 digits are in the file's name.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from torch_utils.errors import UserError
from torch_utils.tensor_file import read_weights

FEATURE_DIM = 2048
_CLASSES = 1008
_SIZE = 299
_COUNTER = ".num_batches_tracked"  # counter of BatchNorm: not used, and missing in some files


class ConvBN(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _square(channels_in: int, channels_out: int, size: int) -> ConvBN:
    """``size`` x ``size`` convolution that keeps height and width."""
    return ConvBN(channels_in, channels_out, size, padding=size // 2)


def _row(channels_in: int, channels_out: int, size: int) -> ConvBN:
    return ConvBN(channels_in, channels_out, (1, size), padding=(0, size // 2))


def _column(channels_in: int, channels_out: int, size: int) -> ConvBN:
    return ConvBN(channels_in, channels_out, (size, 1), padding=(size // 2, 0))


def _average(x: torch.Tensor) -> torch.Tensor:
    """3x3 means without the padding, as TensorFlow pools with "SAME" padding."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35x35 maps; channels_in -> 224 + pool."""

    def __init__(self, channels_in: int, pool: int):
        super().__init__()
        self.branch1x1 = _square(channels_in, 64, 1)
        self.branch5x5_1 = _square(channels_in, 48, 1)
        self.branch5x5_2 = _square(48, 64, 5)
        self.branch3x3dbl_1 = _square(channels_in, 64, 1)
        self.branch3x3dbl_2 = _square(64, 96, 3)
        self.branch3x3dbl_3 = _square(96, 96, 3)
        self.branch_pool = _square(channels_in, pool, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], dim=1)


class BlockB(nn.Module):
    """35x35 -> 17x17; channels_in -> channels_in + 480."""

    def __init__(self, channels_in: int):
        super().__init__()
        self.branch3x3 = ConvBN(channels_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = _square(channels_in, 64, 1)
        self.branch3x3dbl_2 = _square(64, 96, 3)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17x17 maps, 768 channels; ``width`` channels inside the factorised 7x7 convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.branch1x1 = _square(768, 192, 1)
        self.branch7x7_1 = _square(768, width, 1)
        self.branch7x7_2 = _row(width, width, 7)
        self.branch7x7_3 = _column(width, 192, 7)
        self.branch7x7dbl_1 = _square(768, width, 1)
        self.branch7x7dbl_2 = _column(width, width, 7)
        self.branch7x7dbl_3 = _row(width, width, 7)
        self.branch7x7dbl_4 = _column(width, width, 7)
        self.branch7x7dbl_5 = _row(width, 192, 7)
        self.branch_pool = _square(768, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class BlockD(nn.Module):
    """17x17 -> 8x8; 768 -> 1280 channels."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = _square(768, 192, 1)
        self.branch3x3_2 = ConvBN(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _square(768, 192, 1)
        self.branch7x7x3_2 = _row(192, 192, 7)
        self.branch7x7x3_3 = _column(192, 192, 7)
        self.branch7x7x3_4 = ConvBN(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8x8 maps; channels_in -> 2048. max_pool: maximum instead of average, as in the last block."""

    def __init__(self, channels_in: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = _square(channels_in, 320, 1)
        self.branch3x3_1 = _square(channels_in, 384, 1)
        self.branch3x3_2a = _row(384, 384, 3)
        self.branch3x3_2b = _column(384, 384, 3)
        self.branch3x3dbl_1 = _square(channels_in, 448, 1)
        self.branch3x3dbl_2 = _square(448, 384, 3)
        self.branch3x3dbl_3a = _row(384, 384, 3)
        self.branch3x3dbl_3b = _column(384, 384, 3)
        self.branch_pool = _square(channels_in, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(branches, dim=1)


class InceptionV3(nn.Module):
    """RGB images [B,3,H,W] in 0..255, any size and dtype -> pooled features, float32 [B,2048].

    The features do not use ``fc``, the classifier of the graph.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = _square(32, 64, 3)
        self.Conv2d_3b_1x1 = _square(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool=32)
        self.Mixed_5c = BlockA(256, pool=64)
        self.Mixed_5d = BlockA(288, pool=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, max_pool=False)
        self.Mixed_7c = BlockE(2048, max_pool=True)
        self.fc = nn.Linear(FEATURE_DIM, _CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (resize_tf1(images.float(), _SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


def resize_tf1(images: torch.Tensor, size: int) -> torch.Tensor:
    """Bilinear resize [B,C,H,W] -> [B,C,size,size].

    Equals tf.image.resize_bilinear of TensorFlow 1 with align_corners=False.
    """
    for dim in (2, 3):
        length = images.shape[dim]
        if length == size:
            continue
        position = torch.arange(size, dtype=torch.float64) * length / size
        lower = position.floor().long()
        weight = (position - lower).to(images)
        weight = weight[:, None] if dim == 2 else weight
        lower = lower.to(images.device)
        first = images.index_select(dim, lower)
        second = images.index_select(dim, (lower + 1).clamp(max=length - 1))
        images = torch.lerp(first, second, weight.expand_as(first))
    return images


# --------------------------------------------------------------------------------------------------
# State dicts

# The same layers in the wrapper of the package pytorch-fid: blocks.<block>.<place>; gaps are pools.
_WRAPPER = {
    "0": {"0": "Conv2d_1a_3x3", "1": "Conv2d_2a_3x3", "2": "Conv2d_2b_3x3"},
    "1": {"0": "Conv2d_3b_1x1", "1": "Conv2d_4a_3x3"},
    "2": {str(place): f"Mixed_{name}" for place, name in enumerate(["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e"])},
    "3": {str(place): f"Mixed_{name}" for place, name in enumerate(["7a", "7b", "7c"])},
}


def canonical_key(key: str) -> str:
    """The name in this module of a parameter in a known layout; others are returned unchanged.

    Known layouts: the published names, with or without a prefix (``module.``, ``model.``,
    ``inception.``), and those of the wrapper of pytorch-fid (``blocks.2.0.branch1x1.conv.weight``).
    """
    key = re.sub(r"^(module\.|model\.|inception\.)+", "", key)
    match = re.match(r"blocks\.(\d+)\.(\d+)\.(.+)", key)
    layer = _WRAPPER.get(match[1], {}).get(match[2]) if match else None
    return key if layer is None else f"{layer}.{match[3]}"


def load_state(model: InceptionV3, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Load a state dict into model; ``fc`` and BatchNorm's counters may be missing.

    model: the network.
    state: {name: tensor} in a layout of ``canonical_key``.
    where: name of the file for errors.

    Raises UserError if names or shapes differ.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{where}: not a state dict (names -> tensors)")
    given = {canonical_key(key): value for key, value in state.items()}
    given = {key: value for key, value in given.items() if not key.endswith(_COUNTER)}
    expected = {key: value for key, value in model.state_dict().items() if not key.endswith(_COUNTER)}
    missing = [key for key in expected if key not in given and not key.startswith("fc.")]
    unknown = [key for key in given if key not in expected]
    if missing or unknown:
        detail = f"missing {missing[0]}" if missing else f"unknown {unknown[0]}"
        raise UserError(f"{where}: not a state dict of the FID's Inception-v3: {detail}")
    for key, value in given.items():
        if value.shape != expected[key].shape:
            raise UserError(f"{where}: {key} is {list(value.shape)}, expected {list(expected[key].shape)}")
    model.load_state_dict(given, strict=False)


def load_inception(path: str | Path) -> InceptionV3:
    """Load a ``.pth`` state dict, in evaluation mode. No code of the file is run."""
    state = read_weights(path)
    with torch.device("meta"):
        model = InceptionV3()
    model = model.to_empty(device="cpu")
    for module in model.modules():  # these may be missing in the file
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    load_state(model, state, str(path))
    return model.eval().requires_grad_(False)
