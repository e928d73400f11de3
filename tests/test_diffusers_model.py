"""Pipelines of diffusers as denoisers: our Euler against their pipelines, on the same noise."""

import hashlib
import json
import shutil
import sys

import pytest
import torch
from latent_nets import relative_error

from models.denoiser import read_bottleneck
from models.diffusers import load_diffusers, noise_process
from models.noise import RectifiedFlow
from solvers import get_schedule, sample
from torch_utils.errors import MissingExtra, UserError
from torch_utils.seeds import SeededGenerators
from training.loss import DistillationLoss
from training.predictor import AMEDPredictor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers_pipelines import BETAS, SIZE, pipeline_folder  # noqa: E402

TOLERANCE = 1e-4  # relative to the largest magnitude
PROMPTS = ["a b", "c"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The deterministic algorithms need no progress bars."""
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def noise_like(net, batch=2, seed=0):
    shape = (batch, net.img_channels, SIZE, SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def own_euler(net, noise, sigmas, cond):
    """Euler in float64 down to 0, where the last step gives the denoised image."""
    options = {"sigmas": sigmas, "denoise_to_zero": True, "return_info": True}
    x, info = sample(net, noise.double(), solver="euler", cond=cond, **options)
    return x.float(), info


def pipeline_of(net, scheduler=None):
    net.pipeline.set_progress_bar_config(disable=True)
    if scheduler is not None:
        net.pipeline.scheduler = scheduler
    return net.pipeline


def euler_scheduler(net, steps=4):
    scheduler = diffusers.EulerDiscreteScheduler.from_config(net.pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)  # trailing: whole times, where the interpolation of the table does not matter
    return scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_unconditional_euler(prediction):
    net = load_diffusers(pipeline_folder("ddpm", prediction=prediction))
    scheduler = euler_scheduler(net)
    noise = noise_like(net)
    x = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = net.pipeline.unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(output, t, x).prev_sample
    found, info = own_euler(net, noise, scheduler.sigmas[:-1], {})
    assert relative_error(found, x) < TOLERANCE
    assert info.nfe == 4 and (net.img_channels, net.img_resolution, net.label_dim) == (3, SIZE, 0)
    assert not net.latent and torch.equal(net.decode(x), x) and net.make_cond(SeededGenerators([1])) == {}


def test_unconditional_ddim_of_latents():
    """DDIM is Euler on x / sqrt(1 + sigma^2); its pipeline scales noise by 1, not by sigma_max."""
    net = load_diffusers(pipeline_folder("ldm"), guidance_type="uncond")
    config = {**net.pipeline.scheduler.config, "timestep_spacing": "trailing"}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    pipe = pipeline_of(net, scheduler)
    images = pipe(batch_size=2, generator=torch.manual_seed(3), num_inference_steps=5, output_type="np").images
    noise = torch.randn((2, 3, SIZE, SIZE), generator=torch.manual_seed(3))
    sigmas = (1 / scheduler.alphas_cumprod[scheduler.timesteps] - 1).sqrt()
    found, _ = own_euler(net, noise * (1 + sigmas[0] ** 2).sqrt() / sigmas[0], sigmas, {})
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert relative_error((net.decode(found) / 2 + 0.5).clamp(0, 1), expected) < TOLERANCE


@pytest.mark.parametrize("kind, options", [("sd", {}), ("sd", {"prediction": "v_prediction"}), ("sdxl", {})])
@pytest.mark.parametrize("rate", [1, 4.5])
def test_text_to_image_euler(kind, options, rate):
    """The whole pipeline of diffusers, prompts included."""
    net = load_diffusers(pipeline_folder(kind, **options), guidance_rate=rate)
    scheduler = euler_scheduler(net)
    noise = noise_like(net)
    pipe = pipeline_of(net, scheduler)
    arguments = {"num_inference_steps": 4, "guidance_scale": rate, "latents": noise.clone(), "output_type": "latent"}
    expected = pipe(prompt=PROMPTS, **arguments).images
    cond = net.make_cond(SeededGenerators([0, 1]), prompts=PROMPTS)
    found, info = own_euler(net, noise, scheduler.sigmas[:-1], cond)
    assert relative_error(found, expected) < TOLERANCE
    assert info.nfe == (4 if rate == 1 else 8)
    with_negative = pipe(prompt=PROMPTS, negative_prompt=["d"] * 2, **arguments | {"latents": noise.clone()}).images
    cond = net.make_cond(prompts=PROMPTS, negative_prompt="d")
    assert relative_error(own_euler(net, noise, scheduler.sigmas[:-1], cond)[0], with_negative) < TOLERANCE
    assert (relative_error(with_negative, expected) > 1e-3) == (rate != 1)


FLOW_TIMES = [0.97, 0.7, 0.4, 0.1]


@pytest.mark.parametrize("rate", [1, 4.5])
def test_flow_euler_of_sd3(rate):
    net = load_diffusers(pipeline_folder("sd3"), guidance_rate=rate)
    cond = net.make_cond(prompts=PROMPTS)
    noise = noise_like(net)
    pipe = pipeline_of(net)
    pipe.scheduler.set_timesteps(sigmas=FLOW_TIMES)
    times = pipe.scheduler.sigmas[:-1].double()  # shifted
    expected = pipe(
        prompt=PROMPTS, latents=(times[0] * noise).float(), sigmas=FLOW_TIMES, guidance_scale=rate, output_type="latent"
    ).images
    found, info = own_euler(net, noise, times / (1 - times), cond)
    assert relative_error(found, expected) < TOLERANCE
    assert info.nfe == (4 if rate == 1 else 8)


@pytest.mark.parametrize("guidance", [False, True], ids=["rate computed", "rate told"])
def test_flow_euler_of_flux(guidance):
    net = load_diffusers(pipeline_folder("flux", guidance=guidance), guidance_rate=2.5)
    cond = net.make_cond(prompts=PROMPTS, negative_prompt="d")
    noise = noise_like(net)
    pipe = pipeline_of(net)
    shift = {"prompt": PROMPTS, "sigmas": FLOW_TIMES, "height": 2 * SIZE, "width": 2 * SIZE, "output_type": "latent"}
    rates = {"guidance_scale": 2.5} if guidance else {"true_cfg_scale": 2.5, "negative_prompt": ["d"] * 2}
    seen = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, named: seen.append(named["timestep"]), with_kwargs=True)
    packed = pipe._pack_latents(noise, 2, 4, SIZE, SIZE)
    pipe(**shift, **rates, latents=packed)
    times = pipe.scheduler.sigmas[:-1].double()
    expected = pipe(**shift, **rates, latents=(times[0] * packed).float()).images
    expected = pipe._unpack_latents(expected, 2 * SIZE, 2 * SIZE, pipe.vae_scale_factor)
    assert len(seen) == (8 if guidance else 16)
    found, info = own_euler(net, noise, times / (1 - times), cond)
    assert relative_error(found, expected) < TOLERANCE
    assert info.nfe == (4 if guidance else 8)
    default = load_diffusers(pipeline_folder("flux", guidance=guidance))
    assert (default.guidance_rate, default.evals_per_call) == ((3.5, 1) if guidance else (1, 1))


@pytest.mark.parametrize("kind", ["ddpm", "sd", "sdxl", "sd3", "flux"])
def test_one_noise_level_per_sample(kind):
    net = load_diffusers(pipeline_folder(kind), guidance_rate=None if kind == "ddpm" else 2)
    cond = {} if kind == "ddpm" else net.make_cond(prompts=PROMPTS)
    x, sigma = noise_like(net), torch.tensor([0.5, 8.0])
    with torch.no_grad():
        both = net(x, sigma, **cond)
        assert torch.equal(both, net(x, sigma.reshape(-1, 1, 1, 1), **cond))
        for i in range(2):
            row = {name: value[i : i + 1] for name, value in cond.items()}
            assert relative_error(both[i : i + 1], net(x[i : i + 1], sigma[i], **row)) < TOLERANCE
    assert relative_error(both[1], net(x, sigma[0], **cond)[1]) > 1e-3


def test_guidance_is_linear_and_the_bottleneck_conditional():
    folder = pipeline_folder("sd")
    nets = {rate: load_diffusers(folder, guidance_rate=rate) for rate in (1, 3)}
    cond = nets[3].make_cond(prompts=PROMPTS)
    other = {"condition": cond["unconditional_condition"]}
    x, sigma = noise_like(nets[1]), 2.0
    with torch.no_grad(), read_bottleneck(nets[1]) as single, read_bottleneck(nets[3]) as double:
        u = nets[1](x, sigma, **other)
        c = nets[1](x, sigma, condition=cond["condition"])
        assert relative_error(nets[3](x, sigma, **cond), u + 3 * (c - u)) < TOLERANCE
        one, two = single.read(2), double.read(2)
        assert relative_error(two, one) < TOLERANCE and two.shape == (2, 8, 8)
        nets[1](x, sigma, **other)
        assert relative_error(two, single.read(2)) > 1e-3
        single_row = {name: value[:1] for name, value in cond.items()}
        same = {name: value[:1].repeat(2, 1, 1) for name, value in cond.items()}
        assert relative_error(nets[3](x, sigma, **single_row), nets[3](x, sigma, **same)) < TOLERANCE
    plain = load_diffusers(folder, guidance_type="none")
    default = load_diffusers(folder)
    assert (plain.guidance_rate, plain.evals_per_call) == (1, 1)
    assert (default.guidance_rate, default.evals_per_call) == (7.5, 2)


def test_added_conditions_of_sdxl():
    net = load_diffusers(pipeline_folder("sdxl"), guidance_rate=3)
    cond = net.make_cond(prompts=PROMPTS)
    calls = []
    net.network.register_forward_pre_hook(lambda m, a, named: calls.append(named), with_kwargs=True)
    x = noise_like(net)
    base = net(x, 2.0, **cond)
    added = calls[0]["added_cond_kwargs"]
    pixels = 2.0 * SIZE
    assert added["time_ids"].tolist() == [[pixels, pixels, 0, 0, pixels, pixels]] * 4
    assert torch.equal(added["text_embeds"], torch.cat([cond["unconditional_pooled"], cond["pooled"]]))
    assert cond["condition"].shape[-1] == 16  # both encoders
    for name in net.names:
        assert relative_error(net(x, 2.0, **cond | {name: cond[name] + 1}), base) > 1e-4


@pytest.mark.parametrize("kind", ["ddpm", "sd3"])
def test_sampling_with_a_predictor(kind):
    """A transformer has no bottleneck: the predictor sees zeros and depends on time only."""
    net = load_diffusers(pipeline_folder(kind), guidance_type="none")
    cond = {} if kind == "ddpm" else net.make_cond(prompts=PROMPTS)
    torch.manual_seed(0)
    predictor = AMEDPredictor(scale_dir=0.1, scale_time=0.1)
    options = {"num_steps": 3, "schedule_type": "discrete", "schedule_rho": 1, "return_info": True}
    x, info = sample(net, noise_like(net), solver="dpmpp", predictor=predictor, cond=cond, **options)
    assert x.isfinite().all() and info.nfe == 4
    zeros = predictor(torch.zeros(2, 8, 8), info.sigmas[0], info.sigmas[1])[0].flatten()
    if kind == "sd3":
        assert torch.allclose(info.r[0], zeros)
    else:
        assert (info.r[0] - zeros).abs().min() > 1e-4 and info.r[0][0] != info.r[0][1]


def test_training_reaches_the_predictor():
    net = load_diffusers(pipeline_folder("ddpm"))
    settings = {"num_steps": 3, "schedule_type": "discrete", "schedule_rho": 1, "scale_dir": 0.1, "scale_time": 0.1}
    predictor = AMEDPredictor(sampler_stu="dpmpp", sampler_tea="dpmpp", **settings)
    loss = DistillationLoss(net, predictor.config)
    x = noise_like(net) * loss.sigma_max
    targets = loss.teacher_trajectory(x)
    error, _ = loss.student_step(predictor, x, 0, targets[0])
    error.sum().backward()
    gradients = [predictor.get_parameter(f"{name}.weight").grad for name in ("fc_r", "fc_scale_dir", "fc_scale_time")]
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_classes():
    net = load_diffusers(pipeline_folder("ddpm", num_class_embeds=5))
    assert net.label_dim == 5
    cond = net.make_cond(SeededGenerators([0, 1]), labels=[4, 2])
    assert cond["class_labels"].tolist() == [4, 2]
    x = noise_like(net)
    assert relative_error(net(x, 1.0, **cond), net(x, 1.0, **net.make_cond(labels=[3, 2]))) > 1e-4
    assert net.make_cond(SeededGenerators([5, 6]))["class_labels"].shape == (2,)
    with pytest.raises(UserError, match="out of range"):
        net.make_cond(labels=[5])
    with pytest.raises(UserError, match="class_labels"):
        net(x, 1.0)


@pytest.mark.parametrize("kind", ["sd", "sd3", "ldm"])
def test_decode(kind):
    net = load_diffusers(pipeline_folder(kind))
    first_stage = net.parts[net.first_stage_name]
    z = noise_like(net, 9)
    shift = {"sd3": 0.1}.get(kind, 0)
    scale = {"sd": 0.25, "ldm": 0.5, "sd3": 0.18215}[kind]
    with torch.no_grad():
        expected = first_stage.decode(z / scale + shift).sample
        assert relative_error(net.decode(z), expected) < 1e-5
    assert expected.shape == (9, 3, 2 * SIZE, 2 * SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype):
    net = load_diffusers(pipeline_folder("sdxl"), guidance_rate=2, dtype=dtype)
    exact = load_diffusers(pipeline_folder("sdxl"), guidance_rate=2)
    assert net.network.dtype == dtype and net.parts["vae"].dtype == torch.float32
    x = noise_like(net)
    with torch.no_grad():
        y, expected = (one(x, 2.0, **one.make_cond(prompts=PROMPTS)) for one in (net, exact))
        assert relative_error(y, expected) < 0.03
        exact.autocast = torch.bfloat16
        assert relative_error(exact(x, 2.0, **exact.make_cond(prompts=PROMPTS)), expected) < 0.03
        assert net.decode(y).dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Noise tables


@pytest.mark.parametrize(
    "config",
    [
        BETAS,
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.01, 0.02, 0.1, 0.2]},
        {**BETAS, "rescale_betas_zero_snr": True},
    ],
    ids=["scaled_linear", "cosine", "given", "zero SNR"],
)
def test_discrete_table(config):
    scheduler = diffusers.EulerDiscreteScheduler(**config)
    process = noise_process(scheduler.config)
    alphas = scheduler.alphas_cumprod
    times = (torch.arange(len(alphas)) + 1) / len(alphas)
    sigmas = (1 / alphas.double() - 1).sqrt()
    assert torch.allclose(process.sigma(times.double()), sigmas, rtol=1e-3)  # of float32 tables
    steps = torch.arange(len(alphas), dtype=torch.float32)
    assert torch.allclose(process.timestep(process.sigma(times)), steps, atol=0.02)
    assert torch.allclose(process.sigma_of_timestep(steps), process.sigma(times), rtol=1e-3)
    assert process.sigma_max == pytest.approx(sigmas[-1].item(), rel=1e-3)
    found = get_schedule(3, process.sigma_min, process.sigma_max, "discrete", 1, net=process)
    assert process.timestep(found[1]).item() == pytest.approx((len(alphas) - 1) / 2, abs=0.02)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flow_shift(kind):
    """sigma / (1 + sigma) at uniform times are the shifted times of diffusers' own scheduler."""
    options = {"use_dynamic_shifting": True, "time_shift_type": kind}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    tokens, mu = 1000, 0.5 + (1000 - 256) / (4096 - 256) * (1.15 - 0.5)
    times = [0.9, 0.5, 0.1]
    scheduler.set_timesteps(sigmas=times, mu=mu)
    sigma = noise_process(scheduler.config, tokens).sigma(torch.tensor(times))
    assert torch.allclose(sigma / (1 + sigma), scheduler.sigmas[:-1])
    assert noise_process(scheduler.config, mu=mu).shift == noise_process(scheduler.config, tokens).shift
    fixed = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    fixed.set_timesteps(sigmas=times)
    process = noise_process(fixed.config)
    sigma = process.sigma(torch.tensor(times))
    assert torch.allclose(process.timestep(sigma), fixed.timesteps)
    assert torch.allclose(process.sigma_of_timestep(fixed.timesteps), sigma)
    assert torch.allclose(process.sigma_inv(sigma), torch.tensor(times))
    with pytest.raises(UserError, match="size of the image"):
        noise_process(scheduler.config)


# --------------------------------------------------------------------------------------------------
# Files and mistakes


def copy_of(kind, tmp_path, **index):
    """A copy of a pipeline, with changed entries of its index."""
    folder = tmp_path / "copy"
    shutil.copytree(pipeline_folder(kind), folder)
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    return folder


def test_result():
    net = load_diffusers(pipeline_folder("ddpm"))
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.dataset_name == "diffusers" and net.source_path == str(pipeline_folder("ddpm"))
    assert len(net.weights_hash) == 64
    assert (
        net.weights_hash
        != load_diffusers(pipeline_folder("ddpm", prediction="sample", num_class_embeds=3)).weights_hash
    )


@pytest.mark.parametrize(
    "index, message",
    [
        ({"_class_name": "StableCascadePriorPipeline"}, "StableCascadePriorPipeline, which is not supported"),
        ({"_class_name": ["pipeline", "MyPipeline"]}, "not supported"),
        ({"unet": ["os", "system"]}, "code from 'os'"),
        ({"unet": ["unet.my_code", "UNet2DModel"]}, "code from 'unet.my_code'"),
        ({"unet": ["diffusers", "UNet1DModel"]}, "must be a UNet2DModel"),
        ({"scheduler": ["subprocess", "run"]}, "code from 'subprocess'"),
        ({"scheduler": {"subprocess": 0, "run": 0}}, "code from '{'subprocess'"),
        ({"scheduler": ["diffusers", "AutoModel"]}, "may choose any class"),
        ({"scheduler": ["transformers", "RagRetriever"]}, "may choose any class"),
        ({"scheduler": ["diffusers", "DDPMPipeline"]}, "is a whole pipeline"),
        ({"scheduler": [None, None]}, "without its scheduler"),
    ],
)
def test_index_of_another_pipeline(tmp_path, index, message):
    with pytest.raises(UserError, match=message):
        load_diffusers(copy_of("ddpm", tmp_path, **index))


@pytest.mark.parametrize(
    "kind, place", [("ddpm", "unet/diffusers.py"), ("sd", "text_encoder/transformers.py"), ("ddpm", "unet/sub/more.py")]
)
def test_code_beside_the_weights_is_refused(tmp_path, kind, place):
    """diffusers runs <part>/<library>.py in place of the library where it is trusted."""
    folder = copy_of(kind, tmp_path)
    mark = tmp_path / "mark"
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text(f"open({str(mark)!r}, 'w')")
    with pytest.raises(UserError, match=rf"contains code \({(folder / place).name}\), which is not run"):
        load_diffusers(folder)
    assert not mark.exists()


def test_what_is_no_pipeline(tmp_path):
    with pytest.raises(UserError, match="no model_index.json"):
        load_diffusers(tmp_path)
    (tmp_path / "model_index.json").write_text("[")
    with pytest.raises(UserError, match="JSON"):
        load_diffusers(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        load_diffusers(tmp_path / "model_index.json")
    with pytest.raises(UserError, match="neither an existing folder nor a hub id"):
        load_diffusers(tmp_path / "absent")
    folder = copy_of("ddpm", tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_diffusers(folder)


HALF = ("text_encoder", "unet", "vae")


def copy_with_variant(kind, tmp_path, variant, only=None):
    """A pipeline whose parts (all, or those in ``only``) are saved as a variant only."""
    folder = copy_of(kind, tmp_path)
    whole = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    half = tmp_path / "half"
    whole.from_pretrained(folder, dtype=torch.float16).save_pretrained(half, variant=variant)
    for part in folder.iterdir():
        if part.is_dir() and (only is None or part.name in only):
            shutil.rmtree(part)
            shutil.copytree(half / part.name, part)
    return folder


@pytest.mark.parametrize("variant, only", [("fp16", None), ("bf16", ("unet",)), ("mine", ("text_encoder", "vae"))])
def test_a_folder_that_has_only_a_variant(tmp_path, variant, only):
    """Parts with whole weights are loaded from them, the others from the (rounded) variant."""
    folder = copy_with_variant("sd", tmp_path, variant, only)
    net, exact = load_diffusers(folder), load_diffusers(pipeline_folder("sd"))
    for part in HALF:
        rounded = part in (only or HALF)
        for found, whole in zip(net.parts[part].parameters(), exact.parts[part].parameters(), strict=True):
            assert found.dtype == torch.float32
            assert torch.equal(found, whole.half().float() if rounded else whole)
    weights = (
        folder / "unet" / f"diffusion_pytorch_model{f'.{variant}' if 'unet' in (only or HALF) else ''}.safetensors"
    )
    assert net.weights_hash == hashlib.sha256(weights.read_bytes()).hexdigest()
    x = noise_like(net)
    with torch.no_grad():
        y, expected = (one(x, 2.0, **one.make_cond(prompts=PROMPTS)) for one in (net, exact))
    assert relative_error(y, expected) < 0.01
    assert load_diffusers(folder, dtype=torch.float16).parts["vae"].dtype == torch.float32


def test_whole_weights_go_before_variants(tmp_path):
    folder = copy_of("ddpm", tmp_path)
    unet = folder / "unet"
    for variant in ("fp16", "non_ema"):
        (unet / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(b"not read")
    net = load_diffusers(folder)
    assert net.weights_hash == load_diffusers(pipeline_folder("ddpm")).weights_hash
    for path in unet.glob("*.*.safetensors"):
        path.unlink()
    whole = unet / "diffusion_pytorch_model.safetensors"
    shutil.copy(whole, unet / "diffusion_pytorch_model.fp16.safetensors")
    whole.rename(unet / "diffusion_pytorch_model.bf16.safetensors")
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")  # as bf16 has the range of float32
    assert load_diffusers(folder).weights_hash == net.weights_hash


def test_variants_in_several_files(tmp_path):
    folder = copy_of("ddpm", tmp_path)
    network = load_diffusers(folder).network
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    network.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size="10KB")
    files = sorted((folder / "unet").glob("*.safetensors"))
    assert len(files) > 1 and "fp16-00001-of-" in files[0].name
    net = load_diffusers(folder)
    assert torch.equal(net.network.conv_in.weight, network.conv_in.weight.float())
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    assert net.weights_hash == hashlib.sha256(digests.encode()).hexdigest()


def test_a_hub_that_has_only_half_precision(tmp_path, monkeypatch):
    """Whether diffusers says that there are no weights, or leaves them out."""
    folder = copy_with_variant("sd", tmp_path, "fp16")
    empty = tmp_path / "empty"
    shutil.copytree(folder, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    asked = []

    def load_config(name, **options):
        return json.loads((folder / "model_index.json").read_text())

    def download(name, variant=None, **options):
        asked.append(variant)
        if variant is None and len(asked) == 1:
            raise OSError("Could not find the necessary `safetensors` weights")
        return str(empty if variant is None else folder)

    monkeypatch.delenv("AMED_OFFLINE", raising=False)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    for _ in range(2):
        assert load_diffusers("someone/something").weights_hash == load_diffusers(folder).weights_hash
    assert asked == [None, "fp16"] * 2


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pointer_in_place_of_weights(tmp_path, part):
    folder = copy_of("sd", tmp_path)
    (path,) = (folder / part).glob("*.safetensors")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167534\n")
    with pytest.raises(
        UserError, match=rf"{part}/.*model.safetensors cannot be read as weights: it is a Git LFS pointer .*pull'"
    ):
        load_diffusers(folder)


@pytest.mark.parametrize("name, place", [("model_index.json", "."), ("config.json", "unet")])
def test_a_page_in_place_of_a_configuration(tmp_path, name, place):
    folder = copy_of("sd", tmp_path)
    (folder / place / name).write_text("<!doctype html><title>Log in</title>")
    with pytest.raises(UserError, match=rf"{name} is not readable as JSON \(it is a web page \('Log in'\)"):
        load_diffusers(folder)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "unet", "vae", "scheduler", "."])
@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel:function"},
        {"_attn_implementation": "flash_attention_2"},  # a kernel of the hub where flash_attn is not installed
        {"_attn_implementation_internal": "paged|someone/kernel"},
        {"experts_implementation": "someone/kernel"},
        {"deep": [{"deeper": {"attn_implementation": {"text_config": "someone/kernel"}}}]},
        {"auto_map": {"AutoModel": "someone/code--model.Network"}},
        {"trust_remote_code": True},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"use_pretrained_backbone": True},
    ],
    ids=str,
)
def test_configurations_that_ask_for_code(tmp_path, part, entry):
    folder = copy_of("sd", tmp_path)
    name = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}.get(part, "config.json")
    path = folder / part / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entry))
    key = "attn_implementation" if "deep" in entry else next(iter(entry))
    with pytest.raises(UserError, match=f"'{key}' in .*{name} can run or fetch code, which is not done"):
        load_diffusers(folder)


def test_implementations_of_torch_itself_are_no_code(tmp_path):
    folder = copy_of("sd", tmp_path)
    path = folder / "text_encoder" / "config.json"
    harmless = {"attn_implementation": "eager", "_attn_implementation": "sdpa", "auto_map": None, "use_kernels": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | harmless))
    load_diffusers(folder)
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(UserError, match="adapter_config.json refers to another model"):
        load_diffusers(folder)


def test_networks_that_are_not_supported(tmp_path):
    folder = copy_of("sd", tmp_path)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": [8, 16]}))
    with pytest.raises(UserError, match="square"):
        load_diffusers(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": "x"}))
    with pytest.raises(UserError, match="configuration of a part is unusable"):
        load_diffusers(folder)
    with pytest.raises(UserError, match="noise table is unusable"):  # betas above 1
        noise_process({**BETAS, "beta_end": 2.0})
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "EDMEulerScheduler"}))
    for scheduler in (diffusers.EDMEulerScheduler(), diffusers.ScoreSdeVeScheduler()):
        with pytest.raises(UserError, match="no beta_schedule"):
            noise_process(scheduler.config)
    with pytest.raises(UserError, match="prediction_type 'flow'"):
        noise_process({**BETAS, "prediction_type": "flow"})
    with pytest.raises(UserError, match="shift"):
        RectifiedFlow(1000, -1.0)
    with pytest.raises(UserError, match="with 2 steps"):  # a range from sigma 1 to sigma 1
        RectifiedFlow(2)


def test_pickled_weights_are_not_read_unless_allowed(tmp_path):
    folder = copy_of("ddpm", tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    expected = load_diffusers(pipeline_folder("ddpm"))
    torch.save(expected.network.state_dict(), weights.with_suffix(".bin"))
    with pytest.raises(UserError, match="cannot be read"):
        load_diffusers(folder)
    net = load_diffusers(folder, allow_pickle=True)
    x = noise_like(net)
    assert torch.equal(net(x, 1.0), expected(x, 1.0)) and len(net.weights_hash) == 64


def test_pipeline_without_folders(tmp_path):
    """The layout of the first published pipelines: the network lies beside the index."""
    folder = copy_of("ddpm", tmp_path)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    assert load_diffusers(folder).weights_hash == load_diffusers(pipeline_folder("ddpm")).weights_hash


def test_hub(monkeypatch):
    folder = pipeline_folder("ddpm")
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    def load_config(name, **options):
        if str(name) != str(folder):  # which is read once it is there
            asked.append((name, options))
        return json.loads((folder / "model_index.json").read_text())

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", load_config)
    monkeypatch.delenv("AMED_OFFLINE", raising=False)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    net = load_diffusers("someone/something")
    options = {"use_safetensors": True, "trust_remote_code": False}
    assert asked == [("someone/something", {}), ("someone/something", options)]
    assert net.source_path == "someone/something"
    monkeypatch.setenv("AMED_OFFLINE", "1")
    load_diffusers("someone/something")
    local = {"local_files_only": True}
    assert asked[2:] == [("someone/something", local), ("someone/something", options | local)]

    def unreachable(name, **options):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", unreachable)
    with pytest.raises(UserError, match="someone/something cannot be read.*couldn't connect$"):
        load_diffusers("someone/something")


def test_guidance_that_is_not_there():
    with pytest.raises(UserError, match="does not take guidance_type 'cfg'"):
        load_diffusers(pipeline_folder("ddpm"), "cfg", 3.0)
    with pytest.raises(UserError, match="no effect"):
        load_diffusers(pipeline_folder("ddpm"), guidance_rate=3.0)
    with pytest.raises(UserError, match="does not take guidance_type 'cg'"):
        load_diffusers(pipeline_folder("sd"), "cg")
    with pytest.raises(UserError, match="must be 0 or more"):
        load_diffusers(pipeline_folder("sd"), guidance_rate=-1.0)


def test_conditions_that_do_not_fit(tmp_path):
    net = load_diffusers(copy_of("sdxl", tmp_path, text_encoder_2=[None, None], tokenizer_2=[None, None]))
    with pytest.raises(UserError, match="without its text_encoder_2"):
        net.make_cond(prompts=PROMPTS)
    assert load_diffusers(pipeline_folder("ldm")).latent
    net = load_diffusers(copy_of("sd", tmp_path / "latents", vae=[None, None]))
    assert net.latent
    with pytest.raises(UserError, match="without its vae"):
        net.decode(noise_like(net))
    net = load_diffusers(pipeline_folder("sd"))
    x = noise_like(net)
    cond = net.make_cond(prompts=PROMPTS)
    for call, message in (
        (lambda: net.make_cond(), "pass prompts"),
        (lambda: net.make_cond(labels=[0]), "not classes"),
        (lambda: net.make_cond(SeededGenerators([0, 1, 2]), prompts=PROMPTS), "2 prompts were given for a batch of 3"),
        (lambda: net(x, 1.0), "needs 'condition'"),
        (lambda: net(x, 1.0, condition=cond["condition"]), "needs 'unconditional_condition'"),
        (lambda: net(noise_like(net, 3), 1.0, **cond), "2 rows for a batch of 3"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"transformers.*\[diffusers\]"):
        load_diffusers(pipeline_folder("sd"))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtra, match=r"diffusers.*\[diffusers\]"):
        load_diffusers(pipeline_folder("ddpm"))
