"""AMEDScheduler in flow pipelines of diffusers, which pass noise levels of their own.

Each pipeline is built tiny, from its own transformer with random weights, and gets embeddings in
the place of texts. With AMED-Plugin on the method of Euler and without scales, its latents must be
those of FlowMatchEulerDiscreteScheduler at the same noise levels.
"""

import warnings

import pytest
import torch

from training.predictor import AMEDPredictor

diffusers = pytest.importorskip("diffusers")

from sampling.diffusers_scheduler import AMEDScheduler  # noqa: E402

N = 6  # evaluations


def embedding(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def text(width, length=4, mask=True, negative=True):
    """Arguments of a pipeline for two texts."""
    own = {"prompt_embeds": embedding(2, length, width)}
    if negative:
        own["negative_prompt_embeds"] = own["prompt_embeds"].flip(0)
    for name in [*own] if mask else []:
        own[name.replace("embeds", "attention_mask")] = torch.ones(2, length, dtype=torch.bool)
    return own


FLUX = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
ROPE = {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)}


def ltx():
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    return diffusers.LTXPipeline(None, None, None, None, network), {**text(32), "num_frames": 9}


def qwen():
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    own = {**text(16, mask=False, negative=False), "prompt_embeds_mask": torch.ones(2, 4, dtype=torch.long)}
    return diffusers.QwenImagePipeline(None, None, None, None, network), own


def chroma():
    network = diffusers.ChromaTransformer2DModel(
        **FLUX,
        **ROPE,
        joint_attention_dim=32,
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    return diffusers.ChromaPipeline(None, None, None, None, network), text(32)


def aura_flow():
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(None, None, None, network, None), text(32)


def lumina2():
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        cap_feat_dim=8,
    )
    own = {name: value.long() if "mask" in name else value for name, value in text(8).items()}
    return diffusers.Lumina2Pipeline(network, None, None, None, None), own


def flux2():
    network = diffusers.Flux2Transformer2DModel(
        **FLUX, attention_head_dim=16, joint_attention_dim=16, axes_dims_rope=(4, 4, 4, 4)
    )
    return diffusers.Flux2Pipeline(None, None, None, None, network), text(16, mask=False, negative=False)


def ovis():
    network = diffusers.OvisImageTransformer2DModel(**FLUX, **ROPE, out_channels=16, joint_attention_dim=32)
    own = {**text(32, mask=False), "negative_prompt": None}
    return diffusers.OvisImagePipeline(None, None, None, None, network), own


def wan():
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return diffusers.WanPipeline(None, None, None, None, network), {**text(16, mask=False), "num_frames": 5}


def hunyuan_video():
    network = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    own = {**text(16, negative=False), "pooled_prompt_embeds": embedding(2, 8), "num_frames": 5}
    return diffusers.HunyuanVideoPipeline(None, None, network, None, None, None, None), own


def z_image():
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    own = {name: list(value) for name, value in text(16, mask=False).items()}
    return diffusers.ZImagePipeline(None, None, None, None, network), own


def sana():
    network = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
    )
    own = {**text(8), "negative_prompt": None, "use_resolution_binning": False}
    return diffusers.SanaPipeline(None, None, None, network, None), own


def cog_view():
    network = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    return diffusers.CogView4Pipeline(None, None, None, network, None), text(16, 16, mask=False)


class Euler(diffusers.FlowMatchEulerDiscreteScheduler):
    """Diffusers' Euler method at fixed noise levels, whatever the pipeline passes."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(sigmas=self.levels, device=device)


def latents_of(pipe, scheduler, arguments):
    """The latents after every step."""
    pipe.scheduler, seen = scheduler, []
    pipe.set_progress_bar_config(disable=True)

    def keep(pipe, index, time, given):
        seen.append(given["latents"].clone())
        return {}

    more = {"num_inference_steps": N, "output_type": "latent", "callback_on_step_end": keep}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe(height=64, width=64, generator=torch.Generator().manual_seed(0), **arguments, **more)
    return seen


PIPELINES = (ltx, qwen, chroma, aura_flow, lumina2, flux2, ovis, wan, hunyuan_video, z_image, sana, cog_view)


@pytest.mark.parametrize("make", PIPELINES, ids=lambda make: make.__name__)
def test_euler_at_the_same_levels(make):
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    pipe, arguments = make()
    for parameter in pipe.transformer.parameters():  # some layers begin with zeros, or uninitialised
        if not parameter.isfinite().all() or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    predictor = AMEDPredictor(sampler_stu="euler", num_steps=4, schedule_type="discrete", schedule_rho=1)
    scheduler = AMEDScheduler(predictor, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    euler = Euler(shift=1.0)
    scheduler.set_timesteps()
    euler.levels = scheduler.sigmas[:-1].tolist()
    own, expected = (latents_of(pipe, one, arguments) for one in (scheduler, euler))
    assert len(own) == len(expected) == N
    for x, y in zip(own[:-1], expected[:-1], strict=True):  # the last step of Euler goes to 0
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    assert not torch.allclose(own[0], own[-2], rtol=0.1)
