"""Networks that restore images: the U-Net of IR-SDE and the NAFNet of Refusion, official layout.

Both take a noisy state and the degraded image, and return the noise (Luo et al. 2023, arXiv
2301.11699 and 2304.08291).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sinusoidal_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """Sines and cosines [B,width] of times t [B], with frequencies from 1 to 1/10000."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimeEmbedding(nn.Module):
    """First entry of ``time_mlp``; it has no weights, so the official names begin at 1."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, t):
        return sinusoidal_embedding(t, self.width)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of [B,C,H,W], with a gain and no bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x):
        variance, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) * (variance + 1e-5).rsqrt() * self.g


class Gate(nn.Module):
    """Product of the two halves of the channels."""

    def forward(self, x):
        first, second = x.chunk(2, dim=1)
        return first * second


def scale_shift(layer: nn.Module, embedding: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """``parts`` tensors [B,C,1,1] from the embedding [B,E] of the time."""
    return layer(embedding)[..., None, None].chunk(parts, dim=1)


def pad_to_multiple(x: torch.Tensor, multiple: int, mode: str) -> torch.Tensor:
    """x [B,C,H,W], padded at the right and bottom to multiples of ``multiple``."""
    height, width = (-size % multiple for size in x.shape[-2:])
    return F.pad(x, (0, width, 0, height), mode) if height or width else x


class Projection(nn.Module):
    """3x3 convolution without bias, under the official name ``proj``."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, out, 3, padding=1, bias=False)

    def forward(self, x):
        return self.proj(x)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with SiLU; the time scales and shifts the first."""

    def __init__(self, channels: int, out: int, embedding: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out))
        self.block1, self.block2 = Projection(channels, out), Projection(out, out)
        self.res_conv = nn.Conv2d(channels, out, 1, bias=False) if channels != out else nn.Identity()

    def forward(self, x, t):
        scale, shift = scale_shift(self.mlp, t, 2)
        h = F.silu(self.block1(x) * (scale + 1) + shift)
        return F.silu(self.block2(h)) + self.res_conv(x)


class LinearAttention(nn.Module):
    """Attention of linear cost: softmax of q over channels, of k over positions."""

    heads, width = 4, 32

    def __init__(self, channels: int):
        super().__init__()
        inner = self.heads * self.width
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(inner, channels, 1), ChannelNorm(channels))

    def forward(self, x):
        batch, _, height, width = x.shape
        qkv = self.to_qkv(x).reshape(batch, 3, self.heads, self.width, height * width)
        q, k, v = qkv.unbind(1)
        q, k = q.softmax(dim=-2) * self.width**-0.5, k.softmax(dim=-1)
        context = torch.einsum("bhdn,bhen->bhde", k, v / (height * width))
        out = torch.einsum("bhde,bhdn->bhen", context, q)
        return self.to_out(out.reshape(batch, -1, height, width))


class PreNorm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fn, self.norm = LinearAttention(channels), ChannelNorm(channels)

    def forward(self, x):
        return self.fn(self.norm(x))


class ResidualAttention(nn.Module):
    """x + attention(norm(x)), under the official names ``fn.fn`` and ``fn.norm``."""

    def __init__(self, channels: int):
        super().__init__()
        self.fn = PreNorm(channels)

    def forward(self, x):
        return x + self.fn(x)


class ConditionalUNet(nn.Module):
    """The U-Net of IR-SDE: the noise in a state, given the degraded image.

    in_nc, out_nc: channels of the images and of the result.
    nf: width of the first level; each further level doubles it.
    depth: number of levels.
    """

    def __init__(self, in_nc: int = 3, out_nc: int = 3, nf: int = 64, depth: int = 4):
        super().__init__()
        self.depth, embedding = depth, 4 * nf
        self.init_conv = nn.Conv2d(2 * in_nc, nf, 7, padding=3, bias=False)
        self.time_mlp = nn.Sequential(
            TimeEmbedding(nf), nn.Linear(nf, embedding), nn.GELU(), nn.Linear(embedding, embedding)
        )
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level in range(depth):
            narrow, wide = nf * 2**level, nf * 2 ** (level + 1)
            last = level == depth - 1
            down = nn.Conv2d(narrow, wide, 3, padding=1, bias=False) if last else nn.Conv2d(narrow, wide, 4, 2, 1)
            blocks = [ResidualBlock(narrow, narrow, embedding) for _ in range(2)]
            self.downs.append(nn.ModuleList([*blocks, ResidualAttention(narrow), down]))
            up: nn.Module = nn.Conv2d(wide, narrow, 3, padding=1, bias=level > 0)
            if level > 0:
                up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), up)
            blocks = [ResidualBlock(wide + narrow, wide, embedding) for _ in range(2)]
            self.ups.insert(0, nn.ModuleList([*blocks, ResidualAttention(wide), up]))
        middle = nf * 2**depth
        self.mid_block1 = ResidualBlock(middle, middle, embedding)
        self.mid_attn = ResidualAttention(middle)
        self.mid_block2 = ResidualBlock(middle, middle, embedding)
        self.final_res_block = ResidualBlock(2 * nf, nf, embedding)
        self.final_conv = nn.Conv2d(nf, out_nc, 3, padding=1)

    @property
    def bottleneck(self) -> nn.Module:
        return self.mid_block2

    def forward(self, x, degraded, t):
        """The noise [B,C,H,W]; x, degraded: images [B,C,H,W] in [0, 1]; t: times [B]."""
        height, width = x.shape[-2:]
        x = self.init_conv(pad_to_multiple(torch.cat([x - degraded, degraded], 1), 2**self.depth, "reflect"))
        first, t, skips = x, self.time_mlp(t), []
        for block1, block2, attention, down in self.downs:
            x = block1(x, t)
            skips.append(x)
            x = attention(block2(x, t))
            skips.append(x)
            x = down(x)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, t)), t)
        for block1, block2, attention, up in self.ups:
            x = block1(torch.cat([x, skips.pop()], 1), t)
            x = block2(torch.cat([x, skips.pop()], 1), t)
            x = up(attention(x))
        x = self.final_conv(self.final_res_block(torch.cat([x, first], 1), t))
        return x[..., :height, :width]


class NAFBlock(nn.Module):
    """A block without activations: gates instead, and the time scales and shifts both halves."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        wide = 2 * channels
        self.mlp = nn.Sequential(Gate(), nn.Linear(embedding // 2, 4 * channels))
        self.conv1 = nn.Conv2d(channels, wide, 1)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
        self.conv3 = nn.Conv2d(channels, channels, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1))
        self.gate = Gate()
        self.conv4 = nn.Conv2d(channels, wide, 1)
        self.conv5 = nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x, t):
        shift1, scale1, shift2, scale2 = scale_shift(self.mlp, t, 4)
        h = self.gate(self.conv2(self.conv1(self.norm1(x) * (scale1 + 1) + shift1)))
        x = x + self.conv3(h * self.sca(h)) * self.beta
        h = self.gate(self.conv4(self.norm2(x) * (scale2 + 1) + shift2))
        return x + self.conv5(h) * self.gamma


class Blocks(nn.ModuleList):
    """NAF blocks, one after the other."""

    def forward(self, x, t):
        for block in self:
            x = block(x, t)
        return x


class ConditionalNAFNet(nn.Module):
    """The NAFNet of Refusion: the noise in a state, given the degraded image.

    img_channel: channels of the images.
    width: of the first level; each further level doubles it.
    enc_blk_nums, middle_blk_num, dec_blk_nums: number of blocks of each level.
    """

    def __init__(
        self,
        img_channel: int = 3,
        width: int = 16,
        middle_blk_num: int = 1,
        enc_blk_nums: tuple[int, ...] = (),
        dec_blk_nums: tuple[int, ...] = (),
    ):
        super().__init__()
        embedding, self.depth = 4 * width, len(enc_blk_nums)
        self.time_mlp = nn.Sequential(
            TimeEmbedding(width), nn.Linear(width, 2 * embedding), Gate(), nn.Linear(embedding, embedding)
        )
        self.intro = nn.Conv2d(2 * img_channel, width, 3, padding=1)
        self.ending = nn.Conv2d(width, img_channel, 3, padding=1)

        def blocks(count, channels):
            return Blocks([NAFBlock(channels, embedding) for _ in range(count)])

        levels = range(self.depth)
        self.encoders = nn.ModuleList(blocks(enc_blk_nums[i], width << i) for i in levels)
        self.downs = nn.ModuleList(nn.Conv2d(width << i, width << (i + 1), 2, 2) for i in levels)
        self.middle_blks = blocks(middle_blk_num, width << self.depth)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width << (i + 1), width << (i + 2), 1, bias=False), nn.PixelShuffle(2))
            for i in reversed(levels)
        )
        self.decoders = nn.ModuleList(
            blocks(count, width << i) for i, count in zip(reversed(levels), dec_blk_nums, strict=True)
        )

    @property
    def bottleneck(self) -> nn.Module:
        return self.middle_blks

    def forward(self, x, degraded, t):
        """The noise [B,C,H,W]; x, degraded: images [B,C,H,W] in [0, 1]; t: times [B]."""
        height, width = x.shape[-2:]
        x = self.intro(pad_to_multiple(torch.cat([x - degraded, degraded], 1), 2**self.depth, "constant"))
        t, skips = self.time_mlp(t), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x, t)
            skips.append(x)
            x = down(x)
        x = self.middle_blks(x, t)
        for decoder, up in zip(self.decoders, self.ups, strict=True):
            x = decoder(up(x) + skips.pop(), t)
        return self.ending(x)[..., :height, :width]


NETWORKS = {"ConditionalUNet": ConditionalUNet, "ConditionalNAFNet": ConditionalNAFNet}
