"""Tiny random pipelines of the diffusers library, written to disk as save_pretrained does."""

import functools
import tempfile
from pathlib import Path

import torch

SIZE = 8  # of the images or latents
WORDS = ("a", "b", "c", "d")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@functools.cache
def _folder():
    return tempfile.TemporaryDirectory(prefix="pipelines-")  # removed when the interpreter ends


def _scheduler(prediction, **options):
    import diffusers

    return diffusers.DDIMScheduler(
        **{**BETAS, "clip_sample": False, "steps_offset": 1, **options}, prediction_type=prediction
    )


def _condition_unet(cross, **options):
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    )


def _vae(latent_channels=4, **options):
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=2 * SIZE,
        **options,
    )


def _text(projection=False, width=8):
    import transformers

    vocabulary = {f"{word}{end}": i for i, (word, end) in enumerate((w, e) for w in WORDS for e in ("", "</w>"))}
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=width,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
    return kind(config), tokenizer


def _ddpm(prediction="epsilon", **options):
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    )
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    return diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)


def _ldm():
    import diffusers

    vqvae = diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
        num_vq_embeddings=16,
        scaling_factor=0.5,
    )
    return diffusers.LDMPipeline(vqvae=vqvae, unet=_ddpm().unet, scheduler=_scheduler("epsilon"))


def _sd(prediction="epsilon"):
    import diffusers

    text_encoder, tokenizer = _text()
    return diffusers.StableDiffusionPipeline(
        vae=_vae(scaling_factor=0.25),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=_condition_unet(8),
        scheduler=_scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl():
    import diffusers

    first, second = _text(), _text(projection=True)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    }
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=first[0],
        tokenizer=first[1],
        text_encoder_2=second[0],
        tokenizer_2=second[1],
        unet=_condition_unet(16, **added),
        scheduler=_scheduler("epsilon"),
        add_watermarker=False,
    )


def _sd3(channels=4, **options):
    import diffusers

    first, second = _text(projection=True), _text(projection=True)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=SIZE,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options}),
        vae=_vae(channels, shift_factor=0.1),
        text_encoder=first[0],
        tokenizer=first[1],
        text_encoder_2=second[0],
        tokenizer_2=second[1],
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _flux(guidance=False):
    import diffusers
    import transformers

    clip, tokenizer = _text()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((f"▁{word}", -1.0) for word in WORDS)]
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(pieces), d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.1),
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=8),
    )


_KINDS = {"ddpm": _ddpm, "ldm": _ldm, "sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}


@functools.cache
def pipeline_folder(kind: str, **options) -> Path:
    """The folder of a pipeline with random weights, shared between tests: not to be changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = _KINDS[kind](**options)
    path = Path(_folder().name) / f"{kind}-{len(list(Path(_folder().name).iterdir()))}"
    pipeline.save_pretrained(path)
    return path


def controlnet(unet):
    """A ControlNet for ``unet`` whose outputs depend on its time."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):  # zeros at first
            torch.nn.init.normal_(block.weight, std=0.1)
        torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.1)
    return net.eval()
