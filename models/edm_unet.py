"""The U-Nets of EDM, with the parameter names of the official checkpoints.

``SongUNet`` is DDPM++ and NCSN++ (Song et al. 2021, "Score-Based Generative Modeling through
SDEs"). ``DhariwalUNet`` is ADM (Dhariwal & Nichol 2021). Both have the form of Karras et al. 2022,
"Elucidating the Design Space of Diffusion-Based Generative Models", Appendix F.2. They take a
scaled image, a noise label [B] and optional class labels, and return the raw network output.
``models/edm.py`` has the preconditioning.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from torch_utils.errors import UserError


def _init(shape: list[int], fan_in: int, fan_out: int, mode: str, gain: float) -> nn.Parameter:
    if mode == "xavier_uniform":
        values = (2 * torch.rand(shape) - 1) * math.sqrt(6 / (fan_in + fan_out))
    elif mode == "kaiming_uniform":
        values = (2 * torch.rand(shape) - 1) * math.sqrt(3 / fan_in)
    elif mode == "kaiming_normal":
        values = torch.randn(shape) * math.sqrt(1 / fan_in)
    else:
        raise ValueError(f"unknown weight initialisation '{mode}'")
    return nn.Parameter(values * gain)


def like(x: torch.Tensor, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The parameter in the dtype of x. Under autocast, which chooses dtypes itself, as it is."""
    if parameter is None or (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)):
        return parameter
    return parameter.to(x.dtype)


class Linear(nn.Module):
    """y = x W^T + b, with the initialisations of the U-Nets below."""

    def __init__(self, in_features, out_features, bias=True, init="kaiming_normal", gain=1.0):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = _init([out_features, in_features], in_features, out_features, init, gain)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        return F.linear(x, like(x, self.weight), like(x, self.bias))


class Conv2d(nn.Module):
    """Convolution, optionally after (or fused with) a factor-two resampling by a separable filter.

    kernel: size of the convolution; 0: resampling only.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel,
        up=False,
        down=False,
        resample_filter=(1, 1),
        fused_resample=False,
        init="kaiming_normal",
        gain=1.0,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.up, self.down, self.fused_resample = up, down, fused_resample
        self.weight = self.bias = None
        if kernel:
            area = kernel * kernel
            shape = [out_channels, in_channels, kernel, kernel]
            self.weight = _init(shape, in_channels * area, out_channels * area, init, gain)
            self.bias = nn.Parameter(torch.zeros(out_channels))
        self._box = tuple(resample_filter) == (1, 1)
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = torch.outer(taps, taps) / taps.sum().square()
        self.register_buffer("resample_filter", taps[None, None] if up or down else None)

    def _resample(self, x, padding):
        if self._box and not padding:  # equal to the convolutions below
            return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype)
        if self.up:
            taps = (4 * taps).expand(channels, 1, -1, -1)
            return F.conv_transpose2d(x, taps, groups=channels, stride=2, padding=padding)
        return F.conv2d(x, taps.expand(channels, 1, -1, -1), groups=channels, stride=2, padding=padding)

    def forward(self, x):
        weight, bias = like(x, self.weight), like(x, self.bias)
        half = 0 if weight is None else weight.shape[-1] // 2
        filter_pad = (self.resample_filter.shape[-1] - 1) // 2 if self.resample_filter is not None else 0
        if self.fused_resample and weight is not None and (self.up or self.down):
            # One wide padding for both operations, as in the official code.
            if self.up:
                x = self._resample(x, max(filter_pad - half, 0))
                return F.conv2d(x, weight, bias, padding=max(half - filter_pad, 0))
            x = self._resample(F.conv2d(x, weight, padding=half + filter_pad), 0)
            return x + bias.to(x.dtype)[:, None, None]
        if self.up or self.down:
            x = self._resample(x, filter_pad)
        return x if weight is None else F.conv2d(x, weight, bias, padding=half)


class GroupNorm(nn.Module):
    """Group normalisation with at least four channels per group; ValueError for unequal groups."""

    def __init__(self, num_channels, num_groups=32, min_channels_per_group=4, eps=1e-5):
        super().__init__()
        self.num_groups = min(num_groups, num_channels // min_channels_per_group)
        if not self.num_groups or num_channels % self.num_groups:
            raise ValueError(f"group normalisation cannot split {num_channels} channels into {self.num_groups} groups")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, like(x, self.weight), like(x, self.bias), self.eps)


class PositionalEmbedding(nn.Module):
    """Sinusoids of a scalar: [B] -> [B, num_channels], cosines first.

    endpoint: the last frequency is 1 / max_positions. Default False.
    """

    def __init__(self, num_channels, max_positions=10000, endpoint=False):
        super().__init__()
        if num_channels % 2:
            raise ValueError(f"an embedding of {num_channels} channels is not possible: the number must be even")
        self.num_channels = num_channels
        self.max_positions = max_positions
        self.endpoint = endpoint

    def forward(self, x):
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x.device) / (half - (1 if self.endpoint else 0))
        angles = torch.outer(x, ((1 / self.max_positions) ** exponents).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features of a scalar (NCSN++): [B] -> [B, num_channels]."""

    def __init__(self, num_channels, scale=16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x):
        angles = torch.outer(x, (2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block with noise embedding, optional resampling and optional self-attention."""

    omitted: frozenset = frozenset()  # parts to leave out, see ``models.compile.skipping``

    def __init__(
        self,
        in_channels,
        out_channels,
        emb_channels,
        up=False,
        down=False,
        attention=False,
        num_heads=None,
        channels_per_head=64,
        dropout=0.0,
        skip_scale=1.0,
        eps=1e-5,
        resample_filter=(1, 1),
        resample_proj=False,
        adaptive_scale=True,
        init=None,
        init_zero=None,
        init_attn=None,
        step_condition=False,
    ):
        super().__init__()
        init = init or {}
        init_zero = init_zero or {"gain": 0.0}
        init_attn = init_attn or init
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.dropout = dropout
        self.skip_scale = skip_scale
        self.adaptive_scale = adaptive_scale
        self.num_heads = (num_heads or out_channels // channels_per_head) if attention else 0
        if self.num_heads and out_channels % self.num_heads:
            raise ValueError(f"attention cannot split {out_channels} channels into {self.num_heads} heads")

        resample = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample, **init)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, **init_zero)
        if step_condition:
            self.affine_step = Linear(emb_channels, self.affine.out_features, **init)
        self.skip = None
        if out_channels != in_channels or up or down:
            project = resample_proj or out_channels != in_channels
            self.skip = Conv2d(in_channels, out_channels, 1 if project else 0, **resample, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, **init_attn)
            self.proj = Conv2d(out_channels, out_channels, 1, **init_zero)

    @property
    def parts(self) -> tuple[str, ...]:
        return ("residual", "attention") if self.num_heads else ("residual",)

    def _attend(self, x):
        batch, channels, height, width = x.shape
        # The official layout interleaves q, k, v within each head: [heads, channels per head, 3].
        qkv = self.qkv(self.norm2(x)).reshape(batch, self.num_heads, channels // self.num_heads, 3, height * width)
        # Fused kernels need the channels of a head side by side in memory.
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind(0)
        a = F.scaled_dot_product_attention(q, k, v)
        return self.proj(a.transpose(-1, -2).reshape(batch, channels, height, width))

    def forward(self, x, emb, emb_step=None):
        shortcut = x if self.skip is None else self.skip(x)
        x = shortcut if "residual" in self.omitted else self._residual(x, shortcut, emb, emb_step)
        if self.num_heads and "attention" not in self.omitted:
            x = (self._attend(x) + x) * self.skip_scale
        return x

    def _residual(self, x, shortcut, emb, emb_step=None):
        x = self.conv0(F.silu(self.norm0(x)))
        params = [self.affine(emb)[:, :, None, None].to(x.dtype)]
        if emb_step is not None:
            params.append(self.affine_step(emb_step)[:, :, None, None].to(x.dtype))
        if self.adaptive_scale:
            x = self.norm1(x)
            for scale, shift in (pair.chunk(2, dim=1) for pair in params):
                x = torch.addcmul(shift, x, scale + 1)
            x = F.silu(x)
        else:
            for part in params:
                x = x + part
            x = F.silu(self.norm1(x))
        x = self.conv1(F.dropout(x, p=self.dropout, training=self.training))
        return (x + shortcut) * self.skip_scale


class _UNet(nn.Module):
    """Base class of both U-Nets: the embedding of the condition, and the levels."""

    label_dropout = 0.0  # share of the class labels that are replaced by zeros in training

    def _make_layers(self, noise_channels: int, emb_channels: int, init: dict, step_condition: bool) -> None:
        """The layers of the embedding, twice with a step condition (Zhou et al. 2024)."""
        for prefix in ("map_layer", "map_step_layer") if step_condition else ("map_layer",):
            setattr(self, f"{prefix}0", Linear(noise_channels, emb_channels, **init))
            setattr(self, f"{prefix}1", Linear(emb_channels, emb_channels, **init))

    def _make_levels(
        self, block, in_channels, first, widths, num_blocks, img_resolution, attn_resolutions, init, sparse=False
    ) -> int:
        """Encoder ``enc`` and decoder ``dec``. Returns the channels of the decoder's output.

        block: function (channels, out_channels, **options) -> UNetBlock.
        in_channels, first: channels of the images, and of the first convolution.
        widths: channels of each level.
        num_blocks: blocks per level of the encoder; the decoder has one more.
        img_resolution, attn_resolutions: of the images, and of levels with attention, in pixels.
        init: initialisation of the first convolution.
        sparse: only the last block of a level of the decoder has attention. Default False.
        """
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips, channels = [], in_channels
        for level, width in enumerate(widths):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(channels, first, 3, **init)
                channels = first
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, down=True)
                self._add_to_encoder(f"{res}x{res}", channels)
            skips.append(channels)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(channels, width, attention=res in attn_resolutions)
                channels = width
                skips.append(channels)
        for level, width in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, up=True)
            for index in range(num_blocks + 1):
                attention = res in attn_resolutions and (index == num_blocks or not sparse)
                self.dec[f"{res}x{res}_block{index}"] = block(channels + skips.pop(), width, attention=attention)
                channels = width
            self._add_to_decoder(f"{res}x{res}", channels, lowest=level == len(widths) - 1, highest=level == 0)
        return channels

    def _add_to_encoder(self, name: str, channels: int) -> None:
        """Adds layers behind the change to the resolution ``name``."""

    def _add_to_decoder(self, name: str, channels: int, lowest: bool, highest: bool) -> None:
        """Adds layers behind the blocks of the resolution ``name``."""

    @property
    def bottleneck(self) -> nn.Module:
        return [block for name, block in self.enc.items() if "block" in name][-1]

    def _embed(self, number):
        """The features of ``number`` [B]."""
        return self.map_noise(number)

    def _drop_labels(self, labels, x):
        """The one-hot class labels [B or 1,L] of a batch x; in training, some of them are zeros."""
        if self.training and self.label_dropout:
            labels = labels * (torch.rand([x.shape[0], 1], device=x.device) >= self.label_dropout).to(labels.dtype)
        return labels

    def _embed_steps(self, step_condition, noise_labels: torch.Tensor) -> torch.Tensor | None:
        """The embedding [1,E] of a number of time steps (Zhou et al. 2024, arXiv 2409.19681).

        step_condition: the number; None: no embedding.
        noise_labels: tensor whose type and device to use.
        """
        if step_condition is None:
            return None
        if not hasattr(self, "map_step_layer0"):
            raise UserError("this network has no step condition: leave step_condition out")
        emb = self._embed(torch.full([1], float(step_condition), dtype=noise_labels.dtype, device=noise_labels.device))
        return F.silu(self.map_step_layer1(F.silu(self.map_step_layer0(emb))))


class SongUNet(_UNet):
    """DDPM++ (positional embedding, standard encoder) or NCSN++ (Fourier, residual encoder)."""

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.10,
        label_dropout=0.0,
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        decoder_type="standard",
        resample_filter=(1, 1),
        step_condition=False,
    ):
        super().__init__()
        if embedding_type not in ("positional", "fourier"):
            raise ValueError(f"embedding_type '{embedding_type}' is not positional or fourier")
        if encoder_type not in ("standard", "skip", "residual"):
            raise ValueError(f"encoder_type '{encoder_type}' is not standard, skip or residual")
        if decoder_type not in ("standard", "skip"):
            raise ValueError(f"decoder_type '{decoder_type}' is not standard or skip")
        self.label_dropout, self._types = label_dropout, (encoder_type, decoder_type)
        self._image_channels = [in_channels, out_channels]  # of the auxiliary branches
        self._resample = {"resample_filter": resample_filter}
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        init, self._init_zero = {"init": "xavier_uniform"}, {"init": "xavier_uniform", "gain": 1e-5}

        def block(cin, cout, **kwargs):
            return UNetBlock(
                cin,
                cout,
                emb_channels,
                num_heads=1,
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
                resample_proj=True,
                adaptive_scale=False,
                init=init,
                init_zero=self._init_zero,
                init_attn={"init": "xavier_uniform", "gain": math.sqrt(0.2)},
                step_condition=step_condition,
                **self._resample,
                **kwargs,
            )

        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels)
        self.map_label = Linear(label_dim, noise_channels, **init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, **init) if augment_dim else None
        self._make_layers(noise_channels, emb_channels, init, step_condition)
        widths = [model_channels * mult for mult in channel_mult]
        levels = (num_blocks, img_resolution, attn_resolutions, init)
        self._make_levels(block, in_channels, model_channels, widths, *levels, sparse=True)

    def _add_to_encoder(self, name, channels):
        aux, init = self._image_channels[0], {"init": "xavier_uniform"}
        if self._types[0] == "skip":
            self.enc[f"{name}_aux_down"] = Conv2d(aux, aux, 0, down=True, **self._resample)
            self.enc[f"{name}_aux_skip"] = Conv2d(aux, channels, 1, **init)
        elif self._types[0] == "residual":
            fused = {"down": True, "fused_resample": True, **self._resample}
            self.enc[f"{name}_aux_residual"] = Conv2d(aux, channels, 3, **fused, **init)
            self._image_channels[0] = channels

    def _add_to_decoder(self, name, channels, lowest, highest):
        skip, out = self._types[1] == "skip", self._image_channels[1]
        if skip and not lowest:
            self.dec[f"{name}_aux_up"] = Conv2d(out, out, 0, up=True, **self._resample)
        if skip or highest:
            self.dec[f"{name}_aux_norm"] = GroupNorm(channels, eps=1e-6)
            self.dec[f"{name}_aux_conv"] = Conv2d(channels, out, 3, **self._init_zero)

    def _embed(self, number):
        """The sinusoids of ``number`` [B], sines first, as the checkpoints expect."""
        emb = self.map_noise(number)
        return emb.reshape(emb.shape[0], 2, -1).flip(1).reshape(*emb.shape)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, step_condition=None):
        emb = self._embed(noise_labels)
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels, x) * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        emb = F.silu(self.map_layer1(emb))
        emb_step = self._embed_steps(step_condition, noise_labels)

        skips = []
        aux = x
        for name, module in self.enc.items():
            if "aux_down" in name:
                aux = module(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + module(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + module(aux)) / math.sqrt(2)
            else:
                x = module(x, emb, emb_step) if isinstance(module, UNetBlock) else module(x)
                skips.append(x)

        aux = None
        for name, module in self.dec.items():
            if "aux_up" in name:
                aux = module(aux)
            elif "aux_norm" in name:
                normed = module(x)
            elif "aux_conv" in name:
                image = module(F.silu(normed))
                aux = image if aux is None else image + aux
            else:
                if x.shape[1] != module.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, emb, emb_step)
        return aux


class DhariwalUNet(_UNet):
    """ADM as trained by EDM on ImageNet-64: scale-shift norm, 64 channels per attention head."""

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb=4,
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.10,
        label_dropout=0.0,
        step_condition=False,
    ):
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        init = {"init": "kaiming_uniform", "gain": math.sqrt(1 / 3)}

        def block(cin, cout, **kwargs):
            more = {"dropout": dropout, "init": init, "step_condition": step_condition}
            return UNetBlock(cin, cout, emb_channels, **more, **kwargs)

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, gain=0.0) if augment_dim else None
        self._make_layers(model_channels, emb_channels, init, step_condition)
        self.map_label = None
        if label_dim:
            self.map_label = Linear(label_dim, emb_channels, bias=False, gain=math.sqrt(label_dim))

        widths = [model_channels * mult for mult in channel_mult]
        levels = (num_blocks, img_resolution, attn_resolutions, init)
        cout = self._make_levels(block, in_channels, widths[0], widths, *levels)
        self.out_norm = GroupNorm(cout)
        self.out_conv = Conv2d(cout, out_channels, 3, gain=0.0)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None, step_condition=None):
        emb = self._embed(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        emb = self.map_layer1(emb)
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels, x))
        emb = F.silu(emb)
        emb_step = self._embed_steps(step_condition, noise_labels)

        skips = []
        for module in self.enc.values():
            x = module(x, emb, emb_step) if isinstance(module, UNetBlock) else module(x)
            skips.append(x)
        for module in self.dec.values():
            if x.shape[1] != module.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = module(x, emb, emb_step)
        return self.out_conv(F.silu(self.out_norm(x)))


NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def count_parameters(module: nn.Module) -> int:
    return int(np.sum([p.numel() for p in module.parameters()]))
