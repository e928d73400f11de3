"""The U-Net of guided-diffusion and its descendants, with the official parameter names.

One network with options is the U-Net of ADM (Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on
Image Synthesis"), consistency models (Song et al. 2023), latent diffusion and Stable Diffusion
(Rombach et al. 2022). Its encoder with attention pooling is ADM's noisy classifier. Constructor
arguments have the names of the original code. The networks take a scaled image and a time [B].
``models/cm.py``, ``models/adm.py``, ``models/ldm.py`` and ``models/sd.py`` make denoisers of them.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.denoiser import PreconditionedDenoiser
from models.edm import EDMDenoiser
from torch_utils.errors import UserError

# --------------------------------------------------------------------------------------------------
# Parts


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoidal features [B,dim] of times [B], cosines first, float32 (Vaswani et al. 2017)."""
    half = dim // 2
    # Float32 and this order of operations, as in training: at times up to 1500 the rounding of the
    # frequencies is visible in the output.
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * steps / half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


class GroupNorm32(nn.GroupNorm):
    """Group normalisation in float32; the result has the dtype of the input."""

    def forward(self, x):
        weight, bias = self.weight.float(), self.bias.float()
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels: int, eps: float = 1e-5) -> GroupNorm32:
    return GroupNorm32(32, channels, eps=eps)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, followed by a 3x3 convolution if ``use_conv``."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """Halving by a 3x3 convolution of stride 2 if ``use_conv``, else by averaging."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x):
        return self.op(x)


class ResBlock(nn.Module):
    """Residual block; the embedding is a shift, or scale and shift of the second normalisation.

    resample: module without parameters in both branches (``resblock_updown``). Default None.
    """

    parts = ("residual",)
    omitted: frozenset = frozenset()  # parts to leave out, see ``models.compile.skipping``

    def __init__(self, channels, emb_channels, dropout, out_channels=None, use_scale_shift_norm=False, resample=None):
        super().__init__()
        out_channels = out_channels or channels
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resample = resample
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels)
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if out_channels == channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        if self.omitted:
            return self.skip_connection(x if self.resample is None else self.resample(x))
        norm, activation, conv = self.in_layers
        h = activation(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
            h = self.out_layers[1:](h)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


def attend(qkv: torch.Tensor, heads: int, qkv_first: bool) -> torch.Tensor:
    """Self-attention over tokens: qkv [B,3C,N] -> [B,C,N].

    qkv_first: True: the 3C channels are q, k and v, each split into heads (the "new" order of
        guided-diffusion, and flash attention in consistency models). False: they are heads, each
        split into q, k and v (the "legacy" order).
    """
    split = (3, heads, -1) if qkv_first else (heads, 3, -1)
    q, k, v = qkv.unflatten(1, split).transpose(-1, -2).contiguous().unbind(1 if qkv_first else 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map.

    qkv_first: see ``attend``.
    qkv_dims: 1 or 2, for Conv1d or Conv2d projections. Default 1.
    """

    parts = ("attention",)
    omitted: frozenset = frozenset()

    def __init__(self, channels: int, num_heads: int, qkv_first: bool = False, qkv_dims: int = 1):
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d}[qkv_dims]
        self.num_heads = num_heads
        self.qkv_first = qkv_first
        self.qkv_dims = qkv_dims
        self.norm = normalization(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x):
        if self.omitted:
            return x
        tokens = x.flatten(2) if self.qkv_dims == 1 else x
        h = attend(self.qkv(self.norm(tokens)).flatten(2), self.num_heads, self.qkv_first)
        return x + self.proj_out(h.reshape(tokens.shape)).reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Attention pooling of CLIP (Radford et al. 2021): [B,C,S,S] -> [B,out_channels]."""

    def __init__(self, size: int, channels: int, head_channels: int, out_channels: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)
        self.num_heads = channels // head_channels

    def forward(self, x):
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=-1, keepdim=True), tokens], dim=-1) + self.positional_embedding
        return self.c_proj(attend(self.qkv_proj(tokens), self.num_heads, qkv_first=True))[:, :, 0]


class CrossAttention(nn.Module):
    """Attention of tokens [B,N,C] to a context [B,M,context_dim], or to themselves."""

    def __init__(self, channels: int, num_heads: int, context_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Dropout(dropout))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = (
            layer(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, tokens in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate (Shazeer 2020)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels))

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward on tokens [B,N,C], with layer norms."""

    def __init__(self, channels: int, num_heads: int, context_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        self.attn1 = CrossAttention(channels, num_heads, None, dropout)
        self.ff = FeedForward(channels, dropout)
        self.attn2 = CrossAttention(channels, num_heads, context_dim, dropout)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x, context=None):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with cross-attention to a context.

    context_dim: width of the context [B,M,context_dim]. Default: None, self-attention.
    use_linear: Linear instead of 1x1 Conv2d projections (Stable Diffusion 2). Default False.
    """

    parts = ("attention",)
    omitted: frozenset = frozenset()

    def __init__(self, channels, num_heads, depth=1, context_dim=None, dropout=0.0, use_linear=False):
        super().__init__()
        self.use_linear = use_linear
        self.norm = normalization(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, num_heads, context_dim, dropout) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x, context=None):
        if self.omitted:
            return x
        context = None if context is None else context.to(x.dtype)
        h = self.norm(x)
        h = self.proj_in(h.flatten(2).mT).mT if self.use_linear else self.proj_in(h).flatten(2)
        h = h.mT
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h).mT if self.use_linear else self.proj_out(h.mT.reshape(x.shape))
        return x + h.reshape(x.shape)


class TimestepEmbedSequential(nn.Sequential):
    """Layers in a row. A ResBlock also gets the embedding, a SpatialTransformer the context.

    use_checkpoint: recompute activations in the backward pass. Per layer, so that forward hooks of
        this module run once. Default False.
    """

    use_checkpoint = False

    def forward(self, x, emb, context=None):
        for layer in self:
            extra = {ResBlock: (emb,), SpatialTransformer: (context,)}.get(type(layer), ())
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, *extra, use_reentrant=False)
            else:
                x = layer(x, *extra)
        return x


# --------------------------------------------------------------------------------------------------
# Networks


class _Encoder(nn.Module):
    """Base class of the U-Net and the classifier: time embedding, input blocks and middle block.

    The arguments are those of the original code:

    image_size: resolution in pixels; used by the classifier only.
    model_channels, channel_mult: base width, and the width of each level as a multiple of it.
    num_res_blocks: residual blocks per level.
    attention_resolutions: *downsampling factors* (not pixels) of levels with attention; the middle
        block always has it.
    num_heads, num_head_channels: number or width of attention heads; num_heads is used if
        num_head_channels is -1 (default).
    num_heads_upsample: num_heads of the output blocks. Default: num_heads.
    use_new_attention_order: see ``attend``.
    qkv_dims: see ``AttentionBlock``.
    use_spatial_transformer: SpatialTransformer instead of AttentionBlock, with transformer_depth,
        context_dim and use_linear_in_transformer. Default False.
    resblock_updown: resample inside residual blocks. Default: Upsample and Downsample, with
        convolutions if conv_resample.
    use_fp16: torso in float16, see ``convert_torso``. Default False.
    use_checkpoint: less memory and more time for gradients. Default False.
    dims: must be 2.
    legacy: not used; both values give the same network.
    """

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions,
        dropout: float = 0.0,
        channel_mult=(1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        qkv_dims: int = 1,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        use_linear_in_transformer: bool = False,
        legacy: bool = True,
    ):
        super().__init__()
        if dims != 2:
            raise UserError(f"dims={dims}: this U-Net is for images, dims=2")
        if (context_dim is not None) != bool(use_spatial_transformer):
            raise UserError("context_dim and use_spatial_transformer must be given together")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.image_size = image_size
        self.num_classes = num_classes
        self.model_channels = model_channels
        self.dtype = torch.float32  # that of the torso
        self._widths = [int(mult * model_channels) for mult in channel_mult]
        self._attention_factors = {int(factor) for factor in attention_resolutions}
        self.num_res_blocks = num_res_blocks
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self._resample_conv = None if resblock_updown else conv_resample
        emb_channels = 4 * model_channels
        self._res_block = partial(
            ResBlock, emb_channels=emb_channels, dropout=dropout, use_scale_shift_norm=use_scale_shift_norm
        )
        if use_spatial_transformer:
            self._attention_block = partial(
                SpatialTransformer,
                depth=transformer_depth,
                context_dim=context_dim,
                dropout=dropout,
                use_linear=use_linear_in_transformer,
            )
        else:
            self._attention_block = partial(AttentionBlock, qkv_first=use_new_attention_order, qkv_dims=qkv_dims)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)
        channels, factor = self._widths[0], 1
        self.input_blocks = nn.ModuleList([TimestepEmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))])
        self._skips = [channels]  # channels of each input block's output
        for level, width in enumerate(self._widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(TimestepEmbedSequential(*self._stage(channels, width, factor, num_heads)))
                channels = width
                self._skips.append(channels)
            if level < len(self._widths) - 1:
                self.input_blocks.append(TimestepEmbedSequential(self._resample(Downsample, channels)))
                self._skips.append(channels)
                factor *= 2
        self.middle_block = TimestepEmbedSequential(
            self._res_block(channels), self._attention(channels, num_heads), self._res_block(channels)
        )

    def _attention(self, channels: int, num_heads: int) -> nn.Module:
        heads = num_heads if self.num_head_channels == -1 else channels // self.num_head_channels
        if heads < 1 or channels % heads or self.num_head_channels * heads not in (channels, -heads):
            raise UserError(
                f"{channels} channels of attention are not divisible into num_heads={num_heads}, "
                f"num_head_channels={self.num_head_channels}"
            )
        return self._attention_block(channels, num_heads=heads)

    def _stage(self, channels: int, out_channels: int, factor: int, num_heads: int) -> list[nn.Module]:
        """A residual block, with attention at the levels that have it."""
        layers = [self._res_block(channels, out_channels=out_channels)]
        if factor in self._attention_factors:
            layers.append(self._attention(out_channels, num_heads))
        return layers

    def _resample(self, kind: type, channels: int) -> nn.Module:
        """Upsample or Downsample, inside a residual block if resblock_updown."""
        if self._resample_conv is None:
            return self._res_block(channels, resample=kind(channels, use_conv=False))
        return kind(channels, use_conv=self._resample_conv)

    def _finish(self, use_fp16: bool, use_checkpoint: bool) -> None:
        for part in self.modules():
            if isinstance(part, TimestepEmbedSequential):
                part.use_checkpoint = use_checkpoint
        if use_fp16:
            self.convert_torso(torch.float16)

    def convert_torso(self, dtype: torch.dtype) -> None:
        """Run the input, middle and output blocks in ``dtype`` (float16, bfloat16 or float32).

        As in guided-diffusion's ``convert_to_fp16``, convolutions change; normalisations,
        embeddings and the output layers stay float32. Spatial transformers change too, except for
        their group norm.
        """
        self.dtype = dtype
        for name, part in self.named_modules():
            if name.partition(".")[0] not in ("input_blocks", "middle_block", "output_blocks"):
                continue
            if isinstance(part, (nn.Conv1d, nn.Conv2d, BasicTransformerBlock)):
                part.to(dtype)
            elif isinstance(part, SpatialTransformer):
                part.proj_in.to(dtype)
                part.proj_out.to(dtype)

    def _encode(self, x, timesteps, context=None, y=None) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """(bottleneck feature, embedding, outputs of the input blocks)."""
        if (y is None) != (self.num_classes is None):
            kind = "unconditional: it takes no class" if y is not None else "class-conditional: pass class_labels"
            raise UserError(f"this network is {kind}")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, outputs = x.to(self.dtype), []
        for block in self.input_blocks:
            h = block(h, emb, context)
            outputs.append(h)
        return self.middle_block(h, emb, context), emb, outputs


class UNetModel(_Encoder):
    """The U-Net; arguments as in ``_Encoder``. ``middle_block`` is the bottleneck.

    ``forward`` returns [B,out_channels,H,W] in the dtype of x:

    x: [B,in_channels,H,W]; H and W are multiples of the total downsampling.
    timesteps: [B] or [1].
    context: [B,M,context_dim], for spatial transformers. Default None.
    y: class indices [B] of a class-conditional network. Default None.
    """

    def __init__(self, *, num_heads_upsample: int = -1, use_fp16: bool = False, use_checkpoint: bool = False, **kwargs):
        super().__init__(**kwargs)
        channels, factor = self._widths[-1], 2 ** (len(self._widths) - 1)
        num_heads = self.num_heads if num_heads_upsample == -1 else num_heads_upsample
        skips = list(self._skips)
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(self._widths))):
            for i in range(self.num_res_blocks + 1):
                layers = self._stage(channels + skips.pop(), width, factor, num_heads)
                channels = width
                if level and i == self.num_res_blocks:
                    layers.append(self._resample(Upsample, channels))
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            normalization(channels), nn.SiLU(), nn.Conv2d(channels, self.out_channels, 3, padding=1)
        )
        self._finish(use_fp16, use_checkpoint)

    def forward(self, x, timesteps, context=None, y=None):
        h, emb, skips = self._encode(x, timesteps, context, y)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h.to(x.dtype))


class EncoderUNetModel(_Encoder):
    """ADM's noisy classifier: encoder and attention pooling; arguments as in ``_Encoder``.

    ``forward`` returns logits [B,out_channels]:

    x: [B,in_channels,image_size,image_size].
    timesteps: [B] or [1].
    """

    def __init__(self, *, pool: str = "attention", use_fp16: bool = False, use_checkpoint: bool = False, **kwargs):
        super().__init__(**kwargs)
        if pool != "attention":
            raise UserError(f"pool='{pool}' is not supported; use 'attention', as the published classifiers do")
        if self.num_head_channels < 1:
            raise UserError("the attention pooling of a classifier needs num_head_channels")
        channels, size = self._widths[-1], self.image_size // 2 ** (len(self._widths) - 1)
        pooling = AttentionPool2d(size, channels, self.num_head_channels, self.out_channels)
        self.out = nn.Sequential(normalization(channels), nn.SiLU(), pooling)
        self._finish(use_fp16, use_checkpoint)

    def forward(self, x, timesteps):
        h, _, _ = self._encode(x, timesteps)
        return self.out(h.to(x.dtype))


class UNetDenoiser(PreconditionedDenoiser):
    """Base class of the denoisers around a ``UNetModel``, their attribute ``unet``."""

    @property
    def unet(self) -> UNetModel:
        raise NotImplementedError

    @property
    def bottleneck(self) -> torch.nn.Module:
        return self.unet.middle_block

    @property
    def noise_embedding(self) -> torch.nn.Module:
        return self.unet.time_embed[-1]

    def convert_torso(self, dtype: torch.dtype) -> None:
        """Set the dtype (float16, bfloat16, float32) between the U-Net's first and last layers.

        ``autocast`` can be used with it.
        """
        self.unet.convert_torso(dtype)


class PixelUNetDenoiser(UNetDenoiser):
    """Base class of those on pixels."""

    def __init__(self, model: UNetModel):
        super().__init__()
        self.model = model
        self.img_resolution = model.image_size
        self.img_channels = model.in_channels
        self.label_dim = model.num_classes or 0

    @property
    def unet(self) -> UNetModel:
        return self.model

    def make_cond(self, generator=None, labels=None) -> dict:
        """As for EDM, with class indices int64 [B] instead of one-hot rows."""
        cond = EDMDenoiser.make_cond(self, generator, labels)
        return {name: one_hot.argmax(dim=1) for name, one_hot in cond.items()}


# --------------------------------------------------------------------------------------------------
# Settings and files of the published networks

ADM = "a network of guided-diffusion (ADM)"
ADM_CLASSIFIER = "a noisy classifier of guided-diffusion (ADM)"
CONSISTENCY = "a U-Net of consistency models"
LATENT_DIFFUSION = "a latent diffusion model"
STABLE_DIFFUSION = "a Stable Diffusion model"
EDM = "an EDM network"
DIFFUSERS = "a network in diffusers format"

_PREFIXES = {
    ("cond_stage_model.",): STABLE_DIFFUSION,
    ("model.diffusion_model.", "first_stage_model."): LATENT_DIFFUSION,
    ("model.enc.", "model.map_"): EDM,
    ("down_blocks.", "conv_in."): DIFFUSERS,
}

# channel_mult of the published networks by image size (guided-diffusion, script_util.py).
_CHANNEL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


def unet_arguments(config: Mapping) -> dict:
    """Arguments of ``UNetModel`` from the published settings of a pixel network.

    config: settings as published with the checkpoints: num_channels, class_cond, learn_sigma,
        attention_resolutions in pixels ("32,16,8"), and others. Arguments of ``UNetModel`` are
        returned unchanged.

    Raises UserError for unusable settings.
    """
    if "num_channels" not in config:
        return dict(config)
    rest = dict(config)
    return {
        **_levels(rest),
        "in_channels": 3,
        "model_channels": rest.pop("num_channels"),
        "out_channels": 6 if rest.pop("learn_sigma", False) else 3,
        "num_classes": 1000 if rest.pop("class_cond", False) else None,
        **rest,
    }


def classifier_arguments(config: Mapping) -> dict:
    """The same for ``EncoderUNetModel``, from classifier_width, classifier_depth and others."""
    if "classifier_width" not in config:
        return dict(config)
    rest = {name.removeprefix("classifier_"): value for name, value in config.items()}
    return {
        **_levels(rest),
        "in_channels": 3,
        "model_channels": rest.pop("width"),
        "out_channels": 1000,
        "num_res_blocks": rest.pop("depth", 2),
        "num_head_channels": 64,
        **rest,
    }


def _levels(settings: dict) -> dict:
    """Pop image_size, attention_resolutions (as downsampling factors) and channel_mult."""
    size, mult = settings.pop("image_size", None), settings.pop("channel_mult", "")
    resolutions = settings.pop("attention_resolutions", "32,16,8")
    if not mult and size not in tuple(_CHANNEL_MULT):
        raise UserError(f"channel_mult is needed: image_size {size} has no published default")
    try:
        mult = tuple(float(value) for value in mult.split(",")) if mult else _CHANNEL_MULT[size]
        factors = tuple(size // int(resolution) for resolution in resolutions.split(","))
    except (AttributeError, TypeError, ValueError, ZeroDivisionError):
        raise UserError(
            f"attention_resolutions={resolutions!r} and channel_mult={mult!r}: give numbers as in '32,16,8'"
        ) from None
    return {"image_size": size, "attention_resolutions": factors, "channel_mult": mult}


def choose_settings(presets: Mapping[str, Mapping], dataset_name: str, config: Mapping | None) -> Mapping:
    """Return config, or the published settings if it is None. UserError if there are none."""
    if config is None and dataset_name not in presets:
        raise UserError(f"no settings for dataset_name '{dataset_name}'; known: {', '.join(presets)}, or pass config")
    return presets[dataset_name] if config is None else config


def choose_precision(arguments: Mapping, use_fp16: bool | None, device: str | torch.device) -> dict:
    """Set use_fp16 in arguments. None: as published on a GPU, False elsewhere."""
    if use_fp16 is None:
        use_fp16 = bool(arguments.get("use_fp16")) and torch.device(device).type == "cuda"
    return {**arguments, "use_fp16": use_fp16}


def check_family(path: str | Path, state_dict: Mapping[str, torch.Tensor], expected: str) -> None:
    """Raises UserError if ``guess_family`` of a checkpoint is not ``expected``."""
    found = guess_family(state_dict)
    if found != expected:
        raise UserError(
            f"checkpoint {path} is not {expected}"
            + (f": it looks like {found}" if found else f"; its first tensor is '{next(iter(state_dict))}'")
        )


def guess_family(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """The kind of network that has tensors of these names, in words. None: unknown."""
    for prefixes, family in _PREFIXES.items():
        if any(name.startswith(prefixes) for name in state_dict):
            return family
    if "out.2.positional_embedding" in state_dict:
        return ADM_CLASSIFIER
    if "middle_block.1.qkv.weight" in state_dict:
        return CONSISTENCY if state_dict["middle_block.1.qkv.weight"].ndim == 4 else ADM
    return None
