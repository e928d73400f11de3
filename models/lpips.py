"""LPIPS on VGG-16 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric").

The weights are not in this repository. They are read from a file with the state dict of the authors' package, which
``python -c "import lpips, torch; torch.save(lpips.LPIPS(net='vgg').state_dict(), 'lpips-vgg.pth')"`` makes.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

from torch_utils.errors import UserError

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # of the five stages
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1], per colour
HOW = "python -c \"import lpips, torch; torch.save(lpips.LPIPS(net='vgg').state_dict(), 'lpips-vgg.pth')\""


class LPIPS(torch.nn.Module):
    """forward: two batches of images [B,1 or 3,H,W] in [-1, 1], at least 16 pixels wide -> distance [B]."""

    def __init__(self):
        super().__init__()
        self.stages = torch.nn.ModuleList()
        channels = 3
        for widths in WIDTHS:
            convolutions = torch.nn.ModuleList()
            for width in widths:
                convolutions.append(torch.nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            self.stages.append(convolutions)
        self.weights = torch.nn.ParameterList(torch.zeros(1, widths[-1], 1, 1) for widths in WIDTHS)
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1), persistent=False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The last activation of each stage, every position's vector divided by its norm."""
        x = (x.to(torch.float32).expand(-1, 3, -1, -1) - self.shift) / self.scale
        maps = []
        for index, convolutions in enumerate(self.stages):
            x = F.max_pool2d(x, 2) if index else x
            for convolution in convolutions:
                x = F.relu(convolution(x))
            maps.append(x / (x.square().sum(1, keepdim=True) + 1e-20).sqrt())
        return maps

    def forward(self, a, b):
        pairs = zip(self.weights, self.features(a), self.features(b), strict=True)
        return sum((weight * (x - y).square()).sum(1).flatten(1).mean(1) for weight, x, y in pairs)


def load_lpips(path: str | Path, device="cpu") -> LPIPS:
    """The network with the weights of a file. Raises UserError where there is none or it is something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"there is no file {path} with the weights of LPIPS: where the package lpips is, make it with  {HOW}"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load has no common base for what damaged files raise
        raise UserError(f"cannot read the weights of LPIPS in {path}: make the file with  {HOW}") from None
    net = LPIPS()
    try:
        net.load_state_dict(_renamed(state))
    except (RuntimeError, TypeError, AttributeError, KeyError):
        raise UserError(f"{path} does not have the weights of LPIPS on VGG-16: make the file with  {HOW}") from None
    return net.eval().requires_grad_(False).to(device)


def _renamed(state: dict) -> dict:
    """The state dict under our names. Theirs: net.slice<stage>.<layer>.weight, lin<stage>.model.1.weight."""
    layers = sorted({int(key.split(".")[2]) for key in state if re.match(r"net\.slice\d\.\d+\.weight", key)})
    places = [(stage, index) for stage, widths in enumerate(WIDTHS) for index in range(len(widths))]
    names = {str(layer): place for layer, place in zip(layers, places, strict=False)}
    renamed = {}
    for key, value in state.items():
        if found := re.fullmatch(r"net\.slice\d\.(\d+)\.(weight|bias)", key):
            stage, index = names[found[1]]
            renamed[f"stages.{stage}.{index}.{found[2]}"] = value
        elif found := re.fullmatch(r"lin(\d)\.model\.1\.weight", key):
            renamed[f"weights.{found[1]}"] = value
    return renamed
