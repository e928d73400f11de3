"""AMEDScheduler as a guest of diffusers: the checks of its suite, files, copies, pipelines."""

import copy
import gc
import inspect
import json
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from latent_nets import relative_error

from models.diffusers import load_diffusers
from solvers import sample
from solvers.span_table import SpanSolver
from torch_utils.errors import UserError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers_pipelines import BETAS, SIZE, controlnet, pipeline_folder  # noqa: E402
from test_amed_scheduler import PROMPTS, RATE, make_predictor, noise_like, own_sample, run_pipeline  # noqa: E402

from sampling.diffusers_scheduler import AMEDScheduler  # noqa: E402

TOLERANCE = 1e-5
CONFIG = {"num_train_timesteps": 1000, **BETAS}
N = 6  # evaluations of the predictor


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def predictor():
    return make_predictor()


@pytest.fixture(scope="module")
def sd():
    return load_diffusers(pipeline_folder("sd"), guidance_rate=RATE)


@pytest.fixture(scope="module")
def flux():
    return load_diffusers(pipeline_folder("flux", guidance=True), guidance_rate=RATE)


@pytest.fixture
def scheduler(predictor):
    return AMEDScheduler(predictor, **CONFIG)


def image(batch=1, seed=0):
    values = np.random.RandomState(seed).rand(batch, 2 * SIZE, 2 * SIZE, 3).astype(np.float32)
    return torch.from_numpy(values).permute(0, 3, 1, 2)


def mask():
    """Left half kept."""
    value = torch.ones(1, 1, 2 * SIZE, 2 * SIZE)
    value[..., :SIZE] = 0
    return value


def hooks(network):
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks)
        for module in (network, *([network.mid_block] if hasattr(network, "mid_block") else []))
    )


# The ten common checks of diffusers' suite


def one_step(scheduler, time=0, **named):
    sample = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    scheduler.set_timesteps(N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # time 0 is not one of the schedule's
        scheduler.scale_model_input(sample, time)
        return scheduler.step(0.1 * sample, time, sample, **named)


def test_save_config_and_from_pretrained(scheduler, tmp_path):
    scheduler.save_config(tmp_path)
    loaded = AMEDScheduler.from_pretrained(tmp_path)
    assert torch.equal(one_step(scheduler).prev_sample, one_step(loaded).prev_sample)


def test_from_pretrained_keeps_the_config(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictor.safetensors", "scheduler_config.json"]
    config = dict(scheduler.config)
    del config["_use_default_values"]
    assert AMEDScheduler.from_pretrained(tmp_path).config == config
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "AMEDScheduler"


def test_compatibles(scheduler, monkeypatch):
    monkeypatch.setattr(diffusers, "AMEDScheduler", AMEDScheduler, raising=False)
    assert AMEDScheduler in scheduler.compatibles and diffusers.EulerDiscreteScheduler in scheduler.compatibles
    for kind in scheduler.compatibles:
        try:
            other = kind.from_config(scheduler.config)
        except ImportError:  # DPMSolverSDEScheduler needs one more package
            continue
        back = AMEDScheduler.from_config(other.config)
        assert {name: value for name, value in back.config.items() if name in scheduler.config} == scheduler.config
        added = {name for name in back.config if name not in scheduler.config}
        assert not added & set(inspect.signature(AMEDScheduler.__init__).parameters)
    assert len(AMEDScheduler.from_config(back.config, predictor=scheduler.predictor)) == N


def test_step_shape_and_output(scheduler):
    """Two steps with one sample at times outside the schedule; tuple and object are equal."""
    sample = torch.ones(2, 3, 8, 8)
    scheduler.set_timesteps(N)
    with pytest.warns(UserWarning, match="got the time 0, which is none of its times"):
        first = scheduler.step(0.1 * sample, 0, sample).prev_sample
        second = scheduler.step(0.1 * sample, 1, sample).prev_sample
    assert first.shape == second.shape == sample.shape
    assert torch.equal(one_step(scheduler, return_dict=False)[0], one_step(scheduler).prev_sample)


def test_public_interface(scheduler):
    sample = torch.ones(2, 3, 8, 8)
    assert scheduler.init_noise_sigma == pytest.approx(1, abs=0.01) and callable(scheduler.step)
    assert scheduler.scale_model_input(sample, 0.0).shape == sample.shape
    assert "kwargs" not in inspect.signature(AMEDScheduler.__init__).parameters and not AMEDScheduler._deprecated_kwargs
    assert bool(AMEDScheduler()) and scheduler.order == 1
    noised = scheduler.add_noise(sample, sample, scheduler.timesteps[5][None])
    assert noised.shape == sample.shape
    betas = AMEDScheduler(scheduler.predictor, **CONFIG | {"trained_betas": np.array([0.1, 0.3])})
    assert (betas.betas == torch.tensor([0.1, 0.3])).all() and len(betas.alphas_cumprod) == 2


def test_attributes(scheduler, recwarn):
    scheduler.own_attribute = 5
    scheduler.register_to_config(own_entry=5)
    assert scheduler.own_attribute == 5 and scheduler.save_pretrained == scheduler.save_pretrained
    assert not [entry for entry in recwarn if issubclass(entry.category, FutureWarning)]
    with pytest.warns(FutureWarning):
        assert scheduler.own_entry == 5
    with pytest.raises(AttributeError, match="'AMEDScheduler' object has no attribute 'does_not_exist'"):
        scheduler.does_not_exist  # noqa: B018


# What pipelines ask for


def test_indices_and_levels(scheduler):
    """The conventions of diffusers' own schedulers, against EulerDiscreteScheduler's noise."""
    assert scheduler.begin_index is scheduler.step_index is None
    assert len(scheduler.sigmas) == N + 1 and scheduler.sigmas[-1] == 0
    euler = diffusers.EulerDiscreteScheduler(**CONFIG)
    alpha = euler.alphas_cumprod[scheduler.timesteps[2].long()]
    assert scheduler.sigmas[2] == pytest.approx(float(((1 - alpha) / alpha).sqrt()), rel=1e-2)
    assert scheduler.index_for_timestep(scheduler.timesteps[3]) == 3
    assert scheduler.index_for_timestep(5, torch.tensor([9, 5, 5, 1])) == 2
    x, noise = torch.full((2, 1, 1, 1), 0.5), torch.ones(2, 1, 1, 1)
    scheduler.set_timesteps(N)
    scheduler.set_begin_index(2)
    assert scheduler.begin_index == 2 and scheduler.step_index is None
    expected = (x + scheduler.sigmas[2] * noise) / (1 + scheduler.sigmas[2] ** 2).sqrt()
    for found in (scheduler.add_noise(x, noise, torch.tensor([123])), scheduler.scale_noise(x, 123, noise)):
        assert torch.allclose(found, expected)
    scheduler.step(noise, scheduler.timesteps[2], x)
    assert scheduler.step_index == 3
    scheduler.set_timesteps(N)
    assert scheduler.begin_index is scheduler.step_index is None
    with pytest.raises(UserError, match="cannot begin at step 6"):
        scheduler.set_begin_index(6)


def gaussian_run(scheduler, start, own_loop):
    """A run on exact outputs for data N(0, 0.5^2), from its step ``start``."""
    scheduler.set_timesteps(len(scheduler))
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 1, 8, 8, generator=generator) for _ in range(2))
    times = scheduler.timesteps[start:]
    if own_loop:
        x = scheduler.add_noise(0.5 * clean, noise, times[:1].repeat(4))
    else:
        scheduler.set_begin_index(start)
        x = scheduler.add_noise(0.5 * clean, noise, times[:1])
    for t in times:
        sigma = scheduler.process.sigma_of_timestep(t)
        x = scheduler.step(x * sigma * (1 + sigma**2) ** 0.5 / (0.25 + sigma**2), t, x).prev_sample
    return x, 0.5 * clean


@pytest.mark.parametrize("kind", ["dpmpp", "amed", "euler", "full", "amed-table"])
def test_a_start_inside_the_schedule(kind):
    """The run ends at clean images of the right spread, near the original."""
    ends = {"sigma_min": 0.03, "sigma_max": 14.6}
    if kind in ("full", "amed-table"):
        predictor = SpanSolver.preset(kind, num_steps=15, first_step="none", **ends)
    else:
        predictor = make_predictor(kind, num_steps=15, scale_dir=0.0, scale_time=0.0)
        with torch.no_grad():
            predictor.fc_r.weight.zero_()
    for own_loop in (False, True) if kind == "dpmpp" else (False,):
        scheduler = AMEDScheduler(predictor, **CONFIG)
        distance = []
        for start in (0, 1, 4, 7, len(scheduler) - 1):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found, clean = gaussian_run(scheduler, start, own_loop)
            assert len(said) == (start == 1)
            assert found.std() == pytest.approx(0.5, abs=0.12)
            assert not said or "starts at step 1 of" in str(said[0].message)
            distance.append(float((found - clean).square().mean().sqrt()))
        assert distance[-1] < 0.15 < distance[0]


def test_the_rest_of_a_schedule_is_the_loop_on_it(sd):
    """From a schedule point on, the run is that of the loop on the rest of the noise levels."""
    for solver in ("dpmpp", "ipndm", "amed"):
        predictor = make_predictor(solver)
        scheduler = AMEDScheduler(predictor, sd.pipeline.scheduler.config, sd.pipeline.unet)
        scheduler.set_timesteps(N)
        clean, noise = noise_like(sd) / 2, noise_like(sd).flip(0)
        scheduler.set_begin_index(2)
        x = scheduler.add_noise(clean, noise, scheduler.timesteps[2:3])
        cond = sd.make_cond(prompts=PROMPTS)
        rest = [float(value) for value in scheduler._sigmas[1:]]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for t in scheduler.timesteps[2:]:
                doubled = torch.cat([scheduler.scale_model_input(x, t)] * 2)
                text = torch.cat([cond["unconditional_condition"], cond["condition"]])
                plain, own = sd.pipeline.unet(doubled, t, encoder_hidden_states=text).sample.chunk(2)
                x = scheduler.step(plain + RATE * (own - plain), t, x).prev_sample
        start = (clean.double() / rest[0] + noise.double()) * rest[0]
        twin = copy.deepcopy(predictor)
        twin.stated = frozenset()  # it was trained for the whole schedule
        expected = sample(sd, start / rest[0], solver=solver, sigmas=rest, predictor=twin, cond=cond)
        assert relative_error(x, expected.float()) < TOLERANCE


def test_a_time_of_another_step_is_refused(scheduler):
    x = torch.ones(1, 1, 8, 8)
    scheduler.set_timesteps(N)
    x = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    with pytest.raises(UserError, match="of step 3, but step 1 is next"):
        scheduler.step(x, scheduler.timesteps[3], x)
    with pytest.warns(UserWarning, match="eta is ignored"):
        scheduler.step(x, scheduler.timesteps[1], x, eta=0.5)


def test_sigmas_that_pipelines_pass(predictor):
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config
    scheduler = AMEDScheduler(predictor, flow)
    for sigmas in (np.linspace(1, 1 / N, N), np.linspace(1, 0, N + 1)[:-1].tolist(), scheduler.sigmas[:-1]):
        scheduler.set_timesteps(sigmas=sigmas, device="cpu")
        assert len(scheduler.timesteps) == N
    for sigmas, message in ((np.linspace(1, 0.5, N), "its own noise levels"), (np.linspace(1, 1 / 50, 50), "not 50")):
        with pytest.raises(UserError, match=message):
            scheduler.set_timesteps(sigmas=sigmas)
    shifted = [flow_sigma / (1 - flow_sigma) for flow_sigma in scheduler.sigmas[:-1].tolist()]
    assert shifted[0] == pytest.approx(scheduler.process.sigma_max, rel=1e-2)


# Copies and files


def own_loop(net, scheduler, change=lambda i, scheduler: scheduler):
    scheduler.set_timesteps(len(scheduler))
    x = noise_like(net) * scheduler.init_noise_sigma
    text = torch.zeros(2, 8, 8)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            scheduler = change(i, scheduler)
            output = net.pipeline.unet(scheduler.scale_model_input(x, t), t, encoder_hidden_states=text).sample
            x = scheduler.step(output, t, x).prev_sample
    return x


def test_copies(sd):
    """Fresh, attached, and in the middle of a run, at a schedule point and inside an interval."""
    scheduler = AMEDScheduler(make_predictor(afs=True), sd.pipeline.scheduler.config, sd.pipeline.unet)
    expected = own_loop(sd, scheduler)
    for how in (copy.deepcopy, copy.copy):
        for at in range(len(scheduler)):
            twins = []

            def change(i, running, at=at, how=how, twins=twins):
                if i != at:
                    return running
                twins += [running, how(running)]
                return twins[1]

            assert torch.equal(own_loop(sd, scheduler, change), expected)
            assert twins[1]._network is sd.pipeline.unet
            assert (twins[0].predictor is twins[1].predictor) == (how is copy.copy)
            assert twins[0].step_index == (at or None)  # the copy went on alone
            twins[0].detach(), scheduler.attach(sd.pipeline.unet)
    fresh = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
    fresh.attach(sd.pipeline.unet)
    assert torch.equal(own_loop(sd, fresh), expected)
    del twins, change, fresh
    gc.collect()
    assert hooks(sd.pipeline.unet) == 0


def test_hooks_are_there_during_a_run_only(sd):
    unet = sd.pipeline.unet
    arguments = (noise_like(sd), 999, torch.zeros(2, 8, 8))
    with torch.no_grad():
        plain = unet(*arguments).sample
        scheduler = AMEDScheduler(make_predictor(afs=True), sd.pipeline.scheduler.config, unet)
        scheduler.set_timesteps(5)
        assert hooks(unet) == 0 and torch.equal(unet(*arguments).sample, plain)
        assert len(scheduler.timesteps) == 5 and hooks(unet) > 0  # a pipeline begins
        other = AMEDScheduler(make_predictor(), sd.pipeline.scheduler.config, unet)
        expected = own_loop(sd, other)
        assert hooks(unet) == 0  # another pipeline took over the network, and is done
        own_loop(sd, scheduler)
        assert torch.equal(own_loop(sd, other), expected)
    scheduler.set_timesteps(5)
    assert len(scheduler.timesteps) == 5 and hooks(unet) > 0
    del scheduler
    gc.collect()
    assert hooks(unet) == 0


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_a_saved_pipeline_is_a_network(kind, tmp_path):
    """load_diffusers reads the network and the noise of a pipeline with an AMEDScheduler."""
    net = load_diffusers(pipeline_folder(kind), guidance_rate=RATE)
    net.pipeline.scheduler = AMEDScheduler(make_predictor(), net.pipeline.scheduler.config)
    if kind == "sd":
        net.pipeline.register_to_config(requires_safety_checker=False)
    net.pipeline.save_pretrained(tmp_path)
    loaded = load_diffusers(tmp_path, guidance_rate=RATE)
    assert vars(loaded.process).keys() == vars(net.process).keys()
    assert (loaded.sigma_min, loaded.sigma_max) == (net.sigma_min, net.sigma_max)
    x, cond = noise_like(net) * 3, net.make_cond(prompts=PROMPTS)
    with torch.no_grad():
        assert torch.equal(loaded(x, torch.tensor(3.0), **cond), net(x, torch.tensor(3.0), **cond))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["sampling.diffusers_scheduler", "AMEDScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["sampling.other", "AMEDScheduler"]}))
    with pytest.raises(UserError, match="'scheduler' is code from 'sampling.other', which is not run"):
        load_diffusers(tmp_path)


def test_round_trip_of_a_pipeline(sd, tmp_path):
    pipe = diffusers.StableDiffusionPipeline(**load_diffusers(pipeline_folder("sd")).pipeline.components)
    pipe.scheduler = AMEDScheduler(make_predictor(), sd.pipeline.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "scheduler" / "predictor.safetensors").is_file()
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    for scheduler in (
        loaded.scheduler,
        AMEDScheduler.from_pretrained(tmp_path, subfolder="scheduler"),
        AMEDScheduler.from_config(pipe.scheduler.config),
        AMEDScheduler.from_config(sd.pipeline.scheduler.config, predictor=tmp_path / "scheduler/predictor.safetensors"),
    ):
        assert torch.equal(own_loop(sd, scheduler), own_loop(sd, pipe.scheduler))
    euler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert euler.config.beta_end == BETAS["beta_end"]
    with pytest.raises(UserError, match="no predictor: give one"):
        AMEDScheduler.from_config(euler.config).set_timesteps()


def test_push_to_hub(scheduler, monkeypatch):
    """Everything but the network: what is in the folder that gets uploaded."""
    seen = {}
    hub = diffusers.utils.hub_utils
    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **named: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub, "load_or_create_model_card", lambda *a, **k: SimpleNamespace(save=lambda path: None))
    monkeypatch.setattr(hub, "populate_model_card", lambda card: card)

    def upload(self, folder, repo_id, **named):
        loaded = AMEDScheduler.from_pretrained(folder)
        seen[repo_id] = loaded.config.beta_end, len(loaded)

    monkeypatch.setattr(AMEDScheduler, "_upload_folder", upload)
    scheduler.push_to_hub("someone/fast")
    assert seen == {"someone/fast": (BETAS["beta_end"], N)}


# Pipelines


def attached(net, predictor, whole=True):
    pipe = net.pipeline
    network = getattr(pipe, "unet", None) or pipe.transformer
    return AMEDScheduler(predictor, pipe.scheduler.config, network if whole else None)


def call(pipe, scheduler, **arguments):
    original, pipe.scheduler = pipe.scheduler, scheduler
    pipe.set_progress_bar_config(disable=True)
    try:
        options = {"num_inference_steps": len(scheduler), "output_type": "latent", "guidance_scale": RATE}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pipe(**options | arguments, generator=torch.Generator().manual_seed(0)).images
    finally:
        pipe.scheduler = original


def test_image_to_image(sd, predictor):
    """The closer to the image the run starts, the closer it stays."""
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**sd.pipeline.components, requires_safety_checker=False)
    scheduler = attached(sd, predictor)
    start = sd.pipeline.vae.encode(2 * image() - 1).latent_dist.mean * sd.pipeline.vae.config.scaling_factor
    distance = []
    for strength in (0.2, 0.5, 1.0):
        latents = call(pipe, scheduler, prompt="a b", image=image(), strength=strength)
        assert latents.isfinite().all()
        distance.append(float((latents - start).detach().square().mean()))
    assert distance[0] < distance[-1] / 2


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_keeps_the_rest(sd, predictor, strength):
    pipe = diffusers.StableDiffusionInpaintPipeline(**sd.pipeline.components, requires_safety_checker=False)
    prompts = {"prompt": PROMPTS, "image": image(2), "mask_image": mask(), "strength": strength}
    seen = []

    def on_step_end(pipe, index, time, given):
        seen.append(given["latents"].shape)
        return given

    latents = call(pipe, attached(sd, predictor), **prompts, callback_on_step_end=on_step_end)
    assert len(seen) == int(N * strength)
    generator = torch.Generator().manual_seed(0)
    pixels = pipe.image_processor.preprocess(image(2))
    kept = pipe._encode_vae_image(pixels, generator)
    other = call(pipe, attached(sd, predictor), **prompts | {"image": image(2, seed=1)})
    assert torch.allclose(latents[..., : SIZE // 2 - 1], kept[..., : SIZE // 2 - 1], atol=1.0)
    assert not torch.allclose(latents[..., : SIZE // 2 - 1], other[..., : SIZE // 2 - 1], atol=1e-3)


def test_controlnet_is_exact_for_batches(sd):
    """Each image of a batch equals the image made alone, though its times are its own."""
    predictor = make_predictor()
    parts = sd.pipeline.components | {"controlnet": controlnet(sd.pipeline.unet)}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    noise = noise_like(sd)
    both = call(pipe, attached(sd, predictor), prompt=PROMPTS, image=image(2), latents=noise)
    for row in (0, 1):
        own = {"prompt": PROMPTS[row], "image": image(2)[row : row + 1], "latents": noise[row : row + 1]}
        assert relative_error(both[row : row + 1], call(pipe, attached(sd, predictor), **own)) < TOLERANCE
    plain = call(sd.pipeline, attached(sd, predictor), prompt=PROMPTS, latents=noise)
    assert relative_error(both, plain) > 0.01  # the ControlNet does something
    assert not torch.nn.modules.module._global_forward_pre_hooks


SAME_PARTS = (
    *("StableDiffusionPAGPipeline", "StableDiffusionPAGImg2ImgPipeline", "StableDiffusionPanoramaPipeline"),
    *("StableDiffusionControlNetImg2ImgPipeline", "StableDiffusionControlNetInpaintPipeline"),
)


@pytest.mark.parametrize("name", SAME_PARTS)
def test_other_pipelines_of_stable_diffusion(sd, predictor, name):
    kind = getattr(diffusers, name)
    parts = sd.pipeline.components
    if "ControlNet" in name:
        parts = parts | {"controlnet": controlnet(sd.pipeline.unet)}
    arguments = {"prompt": "a b"}
    asked = inspect.signature(kind.__call__).parameters
    for argument, value in (("image", image()), ("mask_image", mask()), ("control_image", image()), ("strength", 0.7)):
        if argument in asked:
            arguments[argument] = value
    if "Panorama" in name:
        arguments |= {"height": 2 * SIZE, "width": 2 * SIZE}
    processors = sd.pipeline.unet.attn_processors
    try:
        pipe = kind(**parts, requires_safety_checker=False)
        assert call(pipe, attached(sd, predictor, "Panorama" not in name), **arguments).isfinite().all()
    finally:
        sd.pipeline.unet.set_attn_processor(processors)


@pytest.mark.parametrize("name", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_other_pipelines_of_xl(predictor, name):
    net = load_diffusers(pipeline_folder("sdxl"), guidance_rate=RATE)
    pipe = getattr(diffusers, name)(**net.pipeline.components, add_watermarker=False)
    arguments = {"prompt": "a b", "image": image(), "strength": 0.7}
    if "Inpaint" in name:
        arguments |= {"mask_image": mask(), "height": 2 * SIZE, "width": 2 * SIZE}
    assert call(pipe, attached(net, predictor), **arguments).isfinite().all()
    # The end of the schedule, as a refiner runs it.
    rest = arguments | {"denoising_start": 0.5, "image": noise_like(net, 1)}
    if "Inpaint" not in name:
        assert call(pipe, attached(net, predictor), **rest).isfinite().all()


@pytest.mark.parametrize("name", ["StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"])
def test_other_pipelines_of_sd3(predictor, name):
    net = load_diffusers(pipeline_folder("sd3", channels=16 if "Inpaint" in name else 4), guidance_rate=RATE)
    pipe = getattr(diffusers, name)(**net.pipeline.components)
    arguments = {"prompt": "a b", "image": image(), "strength": 0.7, "height": 2 * SIZE, "width": 2 * SIZE}
    if "Inpaint" in name:
        arguments["mask_image"] = mask()
    assert call(pipe, attached(net, predictor, whole=False), **arguments).isfinite().all()


@pytest.mark.parametrize("name", ["FluxImg2ImgPipeline", "FluxInpaintPipeline"])
def test_other_pipelines_of_flux(flux, predictor, name):
    pipe = getattr(diffusers, name)(**flux.pipeline.components)
    arguments = {"prompt": "a b", "image": image(), "strength": 0.7, "height": 2 * SIZE, "width": 2 * SIZE}
    if "Inpaint" in name:
        arguments["mask_image"] = mask()
    assert call(pipe, attached(flux, predictor, whole=False), **arguments).isfinite().all()


def test_ddim_pipeline():
    net = load_diffusers(pipeline_folder("ddpm"))
    pipe = diffusers.DDIMPipeline(net.pipeline.unet, net.pipeline.scheduler)
    pipe.scheduler = scheduler = attached(net, make_predictor())
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": len(scheduler), "output_type": "np", "batch_size": 2, "return_dict": False}
    images = pipe(generator=torch.Generator().manual_seed(3), **options)[0]
    noise = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3)) / scheduler.init_noise_sigma
    expected, _ = own_sample(net, scheduler.predictor, noise, {}, False)
    assert np.allclose(images, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-4)
    with pytest.warns(UserWarning, match="eta is ignored"):
        pipe(eta=0.5, **options)


# The network


@pytest.mark.parametrize("how", ["compile", "torch.compile"])
def test_compiled_network(how):
    """One graph, with the bottleneck of each call."""
    net = load_diffusers(pipeline_folder("sd"), guidance_rate=RATE)
    predictor, unet = make_predictor(num_steps=3), net.pipeline.unet
    expected, _ = own_sample(net, predictor, noise_like(net), net.make_cond(prompts=PROMPTS), False)
    if how == "compile":
        unet.compile(fullgraph=True, backend="eager")
    else:
        net.pipeline.unet = torch.compile(unet, fullgraph=True, backend="eager")
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, net.pipeline.unet)
    for _ in range(2):
        assert relative_error(run_pipeline(net, scheduler, noise_like(net)), expected) < TOLERANCE
    assert hooks(unet) == 0


def test_network_that_is_moved_between_calls(sd):
    """As enable_model_cpu_offload does: another forward, which moves the network."""
    predictor, unet = make_predictor(num_steps=3), sd.pipeline.unet
    scheduler = attached(sd, predictor)
    expected, _ = own_sample(sd, predictor, noise_like(sd), sd.make_cond(prompts=PROMPTS), False)
    forward = unet.forward

    def moving(*arguments, **named):
        unet.to("cpu", torch.float64).to("cpu", torch.float32)
        return forward(*arguments, **named)

    unet.forward = moving
    try:
        assert relative_error(run_pipeline(sd, scheduler, noise_like(sd)), expected) < TOLERANCE
    finally:
        del unet.forward


def test_guidance_rate(sd, flux):
    """A rate other than the trained one is pointed out, once."""
    predictor = make_predictor(num_steps=3, guidance_type="cfg", guidance_rate=RATE)
    for rate, said in ((RATE, 0), (2 * RATE, 1), (1, 1)):
        scheduler = attached(sd, predictor)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for _ in range(2):
                run_pipeline(sd, scheduler, noise_like(sd), guidance_scale=rate)
        messages = [str(entry.message) for entry in found if "guidance rate" in str(entry.message)]
        assert len(messages) == said
        assert not said or f"the guidance rate is {rate:g}, but the predictor was trained with {RATE:g}" in messages[0]
    predictor.config["guidance_rate"] = 3.5
    packed = flux.pipeline._pack_latents(noise_like(flux), 2, 4, SIZE, SIZE)
    with pytest.warns(UserWarning, match="the guidance rate is 4.5"):
        run_pipeline(flux, attached(flux, predictor), packed, height=2 * SIZE, width=2 * SIZE)
