"""First stages of latent diffusion (Rombach et al. 2022, appendix G): images to latents and back.

Modules and parameters are named as in the CompVis checkpoints, both stand-alone files and the
``first_stage_model.*`` part of a diffusion checkpoint. The constructors take the ``params`` of the
published configurations.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.openai_unet import Upsample
from torch_utils.errors import UserError

# Positions quantised at a time: the distances of all positions to all codes would take gigabytes.
_LOOKUP_ROWS = 4096


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, dropout: float):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention over all positions with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B,1,HW,C]
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the published weights expect padding at right and bottom only


class Level(nn.Module):
    """Blocks of one resolution, with or without attention, then maybe a change of resolution."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, attention: bool, dropout: float):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(out_channels if index else in_channels, out_channels, dropout) for index in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(out_channels) for _ in range(blocks if attention else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x):
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Middle(nn.Module):
    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, dropout)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[B, in_channels, R, R] -> [B, z_channels (double_z: twice), R/f, R/f], f = 2^(levels - 1)."""

    def __init__(
        self,
        *,
        ch,
        ch_mult,
        num_res_blocks,
        attn_resolutions,
        in_channels,
        resolution,
        z_channels,
        out_ch=None,  # for the decoder, which has the same configuration
        double_z=True,
        dropout=0.0,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for level, mult in enumerate(ch_mult):
            stage = Level(width, ch * mult, num_res_blocks, resolution >> level in attn_resolutions, dropout)
            width = ch * mult
            if level < len(ch_mult) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = Middle(width, dropout)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """[B, z_channels, R/f, R/f] -> images [B, out_ch, R, R]."""

    def __init__(
        self,
        *,
        ch,
        ch_mult,
        num_res_blocks,
        attn_resolutions,
        out_ch,
        resolution,
        z_channels,
        in_channels=None,  # for the encoder, like the next
        double_z=None,
        dropout=0.0,
    ):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, dropout)
        stages = []
        for level, mult in reversed(list(enumerate(ch_mult))):
            stage = Level(width, ch * mult, num_res_blocks + 1, resolution >> level in attn_resolutions, dropout)
            width = ch * mult
            if level > 0:
                stage.upsample = Upsample(width, use_conv=True)
            stages.insert(0, stage)  # numbered from the finest resolution, as in the encoder
        self.up = nn.ModuleList(stages)
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Codebook(nn.Module):
    """Vector quantisation (van den Oord et al. 2017): each position becomes the nearest code.

    n_embed: number of codes.
    embed_dim: channels of a code.
    """

    def __init__(self, n_embed: int, embed_dim: int):
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)

    def indices(self, z: torch.Tensor) -> torch.Tensor:
        """Index of the nearest code at each position: [B,C,h,w] -> int64 [B,h,w]."""
        codes = self.embedding.weight
        half_squares = codes.square().sum(1) / 2
        flat = z.movedim(1, -1).reshape(-1, z.shape[1])
        # argmin |z - e|^2 = argmin |e|^2 / 2 - <z, e>
        nearest = [torch.addmm(half_squares, rows, codes.t(), alpha=-1).argmin(1) for rows in flat.split(_LOOKUP_ROWS)]
        return torch.cat(nearest).reshape(z.shape[0], *z.shape[2:])

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """The quantised z, with the gradient of the identity (straight-through)."""
        quantised = self.embedding(self.indices(z.detach())).movedim(-1, 1)
        return z + (quantised - z).detach()


class FirstStage(nn.Module):
    """Base class. ``encode`` maps images [B,in_channels,R,R] in [-1,1] to latents, ``decode`` back.

    Latents are not scaled here.

    latent_channels: number of channels of the latents.
    downsample_factor: R divided by the resolution of the latents.
    """

    def __init__(self, ddconfig: dict, embed_dim: int, moments: int):
        super().__init__()
        if bool(ddconfig.get("double_z", True)) != (moments == 2):
            raise UserError(f"double_z={ddconfig.get('double_z')} is not possible with {type(self).__name__}")
        self.latent_channels = embed_dim
        self.downsample_factor = 1 << (len(ddconfig["ch_mult"]) - 1)
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)


class VQModel(FirstStage):
    """Vector-quantised first stage; the quantiser is the first step of decoding.

    The published ``VQModelInterface`` does the same. lossconfig, ckpt_path and monitor are for
    training and not used.
    """

    def __init__(self, ddconfig, embed_dim, n_embed, lossconfig=None, ckpt_path=None, monitor=None):
        super().__init__(ddconfig, embed_dim, moments=1)
        self.quantize = Codebook(n_embed, embed_dim)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(images))

    def decode(self, z: torch.Tensor, quantise: bool = True) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(self.quantize(z) if quantise else z))


class AutoencoderKL(FirstStage):
    """First stage with a Gaussian posterior; lossconfig, ckpt_path and monitor are not used."""

    def __init__(self, ddconfig, embed_dim, lossconfig=None, ckpt_path=None, monitor=None):
        super().__init__(ddconfig, embed_dim, moments=2)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, standard deviation) of the latents."""
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()

    def encode(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """The posterior mean, or a sample if unit-variance noise [B,C,h,w] is given."""
        mean, std = self.posterior(images)
        return mean if noise is None else mean + std * noise

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(z))


FIRST_STAGES = {"VQModelInterface": VQModel, "VQModel": VQModel, "AutoencoderKL": AutoencoderKL}


def build_first_stage(config: dict) -> FirstStage:
    """Build the first stage of a published configuration.

    config: ``first_stage_config`` with "target", whose last part is a name of FIRST_STAGES (nothing
        is imported), and "params".

    Raises UserError for any other target.
    """
    name = str(config["target"]).rpartition(".")[2]
    if name not in FIRST_STAGES:
        raise UserError(f"first stage '{name}' is unknown; known: {', '.join(FIRST_STAGES)}")
    return FIRST_STAGES[name](**config["params"])
