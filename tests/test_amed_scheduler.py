"""AMEDScheduler in diffusers pipelines against our sampling loop, same predictor and noise."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from latent_nets import relative_error
from PIL import Image
from pretend_device import PretendedDevice

from models.denoiser import shifted_layers
from models.diffusers import load_diffusers
from solvers import SOLVERS, resolve_sigmas, sample
from solvers.span_table import SpanSolver
from torch_utils.errors import UserError
from training.checkpoint import save_predictor
from training.predictor import AMEDPredictor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers_pipelines import SIZE, pipeline_folder  # noqa: E402

from sampling.diffusers_scheduler import AMEDScheduler  # noqa: E402

TOLERANCE = 1e-5  # relative to the largest magnitude
PROMPTS = ["a b", "c"]
RATE = 4.5


@pytest.fixture(autouse=True)
def quiet():
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def make_predictor(solver="dpmpp", **settings):
    torch.manual_seed(1)
    options = {"num_steps": 4, "schedule_type": "discrete", "schedule_rho": 1, "scale_dir": 0.2, "scale_time": 0.2}
    predictor = AMEDPredictor(sampler_stu=solver, **options | settings).eval()
    with torch.no_grad():  # the outputs of an untrained one hardly depend on the bottleneck
        predictor.enc_layer0.weight.mul_(8)
    return predictor


class TimeOnly(torch.nn.Module):
    """The predictor with zeros for the bottleneck."""

    def __init__(self, predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, feature, *times):
        return self.predictor(torch.zeros_like(feature), *times)


def own_sample(net, predictor, noise, cond, time_only):
    settings = predictor.config
    rule_options = {name: settings[name] for name in SOLVERS[settings["sampler_stu"]].options if name in settings}
    x, info = sample(
        net,
        noise.double(),
        solver=settings["sampler_stu"],
        num_steps=settings["num_steps"],
        schedule_type=settings["schedule_type"],
        schedule_rho=settings["schedule_rho"],
        afs=settings["afs"],
        predictor=TimeOnly(predictor) if time_only else predictor,
        cond=cond,
        return_info=True,
        **rule_options,
    )
    return x.float(), info


def noise_like(net, batch=2):
    return torch.randn((batch, net.img_channels, SIZE, SIZE), generator=torch.Generator().manual_seed(0))


def run_pipeline(net, scheduler, noise, **arguments):
    pipe = net.pipeline
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": RATE, "num_inference_steps": len(scheduler), "output_type": "latent"}
    return pipe(prompt=PROMPTS, latents=noise.clone(), **options | arguments).images


def loop(unet, scheduler, x, scale=True):
    """The loop of a pipeline without guidance."""
    scheduler.set_timesteps(len(scheduler))
    x = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t) if scale else x, t).sample
            x = scheduler.step(output, t, x).prev_sample
    return x


@pytest.mark.parametrize("afs", [False, True], ids=["", "AFS"])
@pytest.mark.parametrize(
    "solver, time_only",
    [*((solver, False) for solver in ("dpmpp", "euler", "ipndm", "amed")), ("dpmpp", True), ("euler", True)],
    ids=lambda value: value if isinstance(value, str) else "time only" if value else "per sample",
)
def test_stable_diffusion(solver, afs, time_only):
    """The whole pipeline, with guidance, for a batch whose samples have times of their own."""
    net = load_diffusers(pipeline_folder("sd"), guidance_rate=RATE)
    predictor = make_predictor(solver, afs=afs)
    config, unet = net.pipeline.scheduler.config, net.pipeline.unet
    scheduler = AMEDScheduler(predictor, config, None if time_only else unet)
    noise = noise_like(net)
    expected, info = own_sample(net, predictor, noise, net.make_cond(prompts=PROMPTS), time_only)
    calls = []
    unet.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[1]))
    for _ in range(2):  # set_timesteps starts anew
        assert relative_error(run_pipeline(net, scheduler, noise), expected) < TOLERANCE
    assert len(calls) == 2 * len(scheduler) == info.nfe  # in pairs under guidance, twice
    assert (info.r[1][0] != info.r[1][1]) != time_only
    times = torch.stack([call.float().mean() for call in calls[: len(scheduler)]])
    assert torch.allclose(times, scheduler.timesteps)
    assert (times[1:] < times[:-1]).all()


@pytest.mark.parametrize(
    "solver, kind, per_sample", [("amed", "sd", True), ("dpmpp", "sd", False), ("euler", "flux", True)]
)
def test_a_pipeline_does_not_wait_for_the_scheduler(solver, kind, per_sample):
    """It waits once in a call, for the guidance rate, which it compares with the trained one."""
    folder = pipeline_folder(kind, **({"guidance": True} if kind == "flux" else {}))
    predictor = make_predictor(solver, afs=True, guidance_type="cfg", guidance_rate=RATE)
    net = load_diffusers(folder, guidance_rate=RATE)
    with PretendedDevice("cuda", Path(__file__).resolve().parents[1]) as gpu:
        net.pipeline.to("cuda")
        network = net.pipeline.unet if kind == "sd" else net.pipeline.transformer
        scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, network if per_sample else None)
        noise = noise_like(net)
        noise = net.pipeline._pack_latents(noise, 2, 4, SIZE, SIZE) if kind == "flux" else noise
        size = {"height": 2 * SIZE, "width": 2 * SIZE} if kind == "flux" else {}
        found = []
        for _ in range(2):
            gpu.clear()
            found.append(run_pipeline(net, scheduler, noise.to("cuda"), **size).cpu())
            waits = {line: count for (_, line), count in gpu.waits.items() if line != "elsewhere"}
            assert sum(waits.values()) <= 1, waits
    net = load_diffusers(folder, guidance_rate=RATE)
    network = net.pipeline.unet if kind == "sd" else net.pipeline.transformer
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, network if per_sample else None)
    expected = run_pipeline(net, scheduler, noise, **size)
    assert all(relative_error(images, expected) < TOLERANCE for images in found)


def test_without_guidance_and_with_other_predictions():
    for prediction in ("v_prediction", "sample"):
        net = load_diffusers(pipeline_folder("sd", prediction=prediction), guidance_rate=1)
        predictor = make_predictor()
        scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, net.pipeline.unet)
        expected, _ = own_sample(net, predictor, noise_like(net), net.make_cond(prompts=PROMPTS), False)
        assert relative_error(run_pipeline(net, scheduler, noise_like(net), guidance_scale=1), expected) < TOLERANCE


def test_the_published_schedule():
    """A predictor trained with original_code has the noise levels of the published code."""
    net = load_diffusers(pipeline_folder("sd"), guidance_rate=RATE)
    schedule = {"num_steps": 4, "schedule_type": "discrete", "schedule_rho": 2, "sigma_max": 5.0}
    predictor = make_predictor("ipndm_v", **schedule, original_code=True)
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, net.pipeline.unet)
    own = {"solver": "ipndm_v", "predictor": predictor, "cond": net.make_cond(prompts=PROMPTS), "return_info": True}
    expected, info = sample(net, noise_like(net).double(), **schedule, **own, original_code=True)
    assert not torch.allclose(info.sigmas, resolve_sigmas(net, **schedule), rtol=1e-2)
    assert relative_error(run_pipeline(net, scheduler, noise_like(net)), expected.float()) < TOLERANCE


def test_stable_diffusion_xl():
    net = load_diffusers(pipeline_folder("sdxl"), guidance_rate=RATE)
    predictor = make_predictor()
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, net.pipeline.unet)
    expected, _ = own_sample(net, predictor, noise_like(net), net.make_cond(prompts=PROMPTS), False)
    assert relative_error(run_pipeline(net, scheduler, noise_like(net)), expected) < TOLERANCE


@pytest.mark.parametrize("afs", [False, True], ids=["", "AFS"])
def test_pipelines_that_do_not_scale_their_noise(afs):
    """A pixel model, and a flow transformer, which has no bottleneck."""
    net = load_diffusers(pipeline_folder("ddpm"))
    predictor = make_predictor(schedule_type="polynomial", schedule_rho=7, afs=afs)
    expected, _ = own_sample(net, predictor, noise_like(net), {}, False)
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, net.pipeline.unet)
    for scale in (True, False):
        assert relative_error(loop(net.pipeline.unet, scheduler, noise_like(net), scale), expected) < TOLERANCE
    assert net.pipeline.unet(noise_like(net), 3).sample.isfinite().all()  # calls for something else are left alone

    net = load_diffusers(pipeline_folder("sd3"), guidance_rate=RATE)
    predictor = make_predictor("euler", afs=afs)
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, net.pipeline.transformer if afs else None)
    noise = noise_like(net)
    expected, _ = own_sample(net, predictor, noise, net.make_cond(prompts=PROMPTS), False)
    found = run_pipeline(net, scheduler, noise * scheduler.init_noise_sigma)
    assert relative_error(found, expected) < TOLERANCE
    assert 0 < relative_error(run_pipeline(net, scheduler, noise), found) < 0.01  # as the pipeline draws it itself


def test_pipeline_that_copies_the_times():
    """Such a pipeline passes the planned times; the hook knows better."""
    net = load_diffusers(pipeline_folder("ddpm"))
    predictor = make_predictor()
    unet = net.pipeline.unet
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, unet)
    expected, _ = own_sample(net, predictor, noise_like(net), {}, False)
    scheduler.set_timesteps(len(scheduler))
    x = noise_like(net) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps.clone():
            x = scheduler.step(unet(sample=x, timestep=t).sample, t, x).prev_sample
    assert relative_error(x, expected) < TOLERANCE


def test_packed_latents_and_a_shift_from_the_image_size():
    net = load_diffusers(pipeline_folder("flux", guidance=True), guidance_rate=RATE)
    predictor = make_predictor(afs=True)
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, net.pipeline.transformer)
    with pytest.raises(UserError, match="size of the image"):
        scheduler.set_timesteps(len(scheduler))
    noise = noise_like(net)
    packed = net.pipeline._pack_latents(noise, 2, 4, SIZE, SIZE)
    shape = {"height": 2 * SIZE, "width": 2 * SIZE}
    run_pipeline(net, scheduler, packed, **shape)
    found = run_pipeline(net, scheduler, packed * scheduler.init_noise_sigma, **shape)
    found = net.pipeline._unpack_latents(found, 2 * SIZE, 2 * SIZE, 2)
    net.process = scheduler.process  # of 8x8 latents
    net.sigma_min, net.sigma_max = net.process.sigma_min, net.process.sigma_max
    expected, _ = own_sample(net, predictor, noise, net.make_cond(prompts=PROMPTS), True)
    assert relative_error(found, expected) < TOLERANCE


def test_from_a_file_in_half_precision(tmp_path):
    net = load_diffusers(pipeline_folder("sd"), guidance_rate=RATE)
    half = load_diffusers(pipeline_folder("sd"), guidance_rate=RATE, dtype=torch.bfloat16)
    predictor = make_predictor("euler")
    save_predictor(predictor, tmp_path / "predictor-000010.safetensors")
    expected, _ = own_sample(net, predictor, noise_like(net), net.make_cond(prompts=PROMPTS), True)
    for source in (tmp_path, str(tmp_path / "predictor-000010.safetensors")):
        scheduler = AMEDScheduler.from_predictor(source, net.pipeline.scheduler.config)
        assert relative_error(run_pipeline(net, scheduler, noise_like(net)), expected) < TOLERANCE
    found = run_pipeline(half, scheduler, noise_like(net).bfloat16())
    assert found.dtype == torch.bfloat16 and relative_error(found.float(), expected) < 0.05


def test_protocol():
    net = load_diffusers(pipeline_folder("sd"))
    original = diffusers.DDIMScheduler.from_config(net.pipeline.scheduler.config)
    scheduler = AMEDScheduler(make_predictor(afs=True), original.config)
    assert isinstance(scheduler, diffusers.SchedulerMixin) and isinstance(scheduler, diffusers.ConfigMixin)
    assert scheduler.order == 1
    assert len(scheduler) == scheduler.num_inference_steps == len(scheduler.timesteps) == 5
    assert scheduler.config.num_train_timesteps == 1000 and scheduler.config["beta_end"] == 0.012
    x, noise = noise_like(net), noise_like(net).flip(0)
    times = torch.tensor([0, 700])
    assert torch.allclose(scheduler.add_noise(x, noise, times), original.add_noise(x, noise, times), atol=1e-5)
    scheduler.set_timesteps(5)
    latents = scheduler.scale_model_input(x, scheduler.timesteps[0])
    assert scheduler.step(latents, scheduler.timesteps[0], x, return_dict=False)[0].shape == x.shape
    assert scheduler.set_begin_index(0) is None


def test_latents_changed_from_outside():
    """The solver goes on from latents changed at the start of an interval; inside, they give D."""
    net = load_diffusers(pipeline_folder("ddpm"))
    predictor = make_predictor("euler", num_steps=3)
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config)

    def run(changed_before):
        scheduler.set_timesteps(4)
        x = noise_like(net) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            if i == changed_before:
                x = x + 0.5
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
        return x

    # Without noise to remove, the image is what comes in over the scale of its noise level.
    start, middle = (scheduler.process.scale(sigma) for sigma in scheduler._sigmas[:2])
    assert torch.allclose(run(None), noise_like(net) * scheduler.init_noise_sigma / start, rtol=1e-4)
    assert torch.allclose(run(2) - run(None), torch.full_like(noise_like(net), 0.5 / middle.item()), rtol=1e-3)
    inside = scheduler.process.scale(scheduler._calls[1].sigma_cond)
    d = -0.5 / inside / scheduler._calls[1].sigma  # D is higher by 0.5 / inside there
    scale = predictor(torch.zeros(1, 8, 8), scheduler._sigmas[0], scheduler._sigmas[1])[1]
    moved = scale * d * (scheduler._sigmas[1] - scheduler._calls[1].sigma)
    assert torch.allclose(run(1) - run(None), moved.float().expand_as(noise_like(net)), rtol=1e-3)


def test_mistakes():
    net = load_diffusers(pipeline_folder("ddpm"))
    config = net.pipeline.scheduler.config
    scheduler = AMEDScheduler(make_predictor(num_steps=3), config)
    with pytest.raises(UserError, match="num_inference_steps=4, not 50"):
        scheduler.set_timesteps(50)
    with pytest.raises(UserError, match="cannot begin at step 4"):
        scheduler.set_begin_index(4)
    x = loop(net.pipeline.unet, scheduler, noise_like(net))
    with pytest.raises(UserError, match="set_timesteps before"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(UserError, match="does not call scale_model_input: pass"):
        loop(net.pipeline.unet, AMEDScheduler(make_predictor(afs=True), config), x, scale=False)
    for settings, message in (
        ({"afs": "data"}, "statistics of the data"),
        ({"solver": "heun"}, "no predictor can be inserted"),
        ({"solver": "nothing"}, "unknown solver"),
        ({"sigma_max": 1e9}, "outside the network's range"),
    ):
        with pytest.raises(UserError, match=message):
            AMEDScheduler(make_predictor(**settings), config)
    with pytest.raises(UserError, match="unet or transformer"):
        scheduler.attach("unet")
    with pytest.raises(UserError, match="no beta_schedule"):
        AMEDScheduler(make_predictor(), {"num_train_timesteps": 1000})


def test_detach():
    net = load_diffusers(pipeline_folder("ddpm"))
    unet = net.pipeline.unet
    predictor = make_predictor()
    scheduler = AMEDScheduler(predictor, net.pipeline.scheduler.config, unet)
    scheduler.detach()
    assert not unet._forward_pre_hooks and not unet.mid_block._forward_hooks
    expected, _ = own_sample(net, predictor, noise_like(net), {}, True)
    assert relative_error(loop(unet, scheduler, noise_like(net)), expected) < TOLERANCE


def test_solvers_do_not_need_diffusers():
    """The package imports without diffusers; using the scheduler says what is missing."""
    code = """
import sys
import solvers
from torch_utils.errors import MissingExtra
assert "diffusers" not in sys.modules and "transformers" not in sys.modules
sys.modules["diffusers"] = None
try:
    from sampling.diffusers_scheduler import AMEDScheduler
except MissingExtra as error:
    print(error)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "AMEDScheduler needs the package 'diffusers'" in done.stdout and done.stdout.count("\n") == 1


@pytest.mark.parametrize("kind", ["sd", "ldm"])
def test_example(kind, tmp_path, monkeypatch):
    """One image per seed, and the seed alone decides."""
    path = Path(__file__).parents[1] / "examples" / "diffusers_amed.py"
    example = SimpleNamespace(**runpy.run_path(str(path)))
    save_predictor(make_predictor(num_steps=3, afs=True), tmp_path / "predictor-000001.safetensors")
    arguments = [f"--pipeline={pipeline_folder(kind)}", f"--predictor={tmp_path}", "--device=cpu"]
    text = ["--prompt=a b", "--guidance=2"] if kind == "sd" else []
    for seeds, outdir in (("3,5", "both"), ("5", "one")):
        options = [*arguments, *text, f"--seeds={seeds}", f"--outdir={tmp_path / outdir}"]
        result = CliRunner().invoke(example.main, options, catch_exceptions=False)
        assert result.exit_code == 0 and "images in 3 evaluations" in result.output
    assert sorted(file.name for file in (tmp_path / "both").iterdir()) == ["000003.png", "000005.png"]
    both, one = (np.asarray(Image.open(tmp_path / name / "000005.png")).astype(int) for name in ("both", "one"))
    assert abs(both - one).max() <= 1 and both.shape == (2 * SIZE, 2 * SIZE, 3)
    if kind == "sd":
        assert "give --prompt" in CliRunner().invoke(example.main, arguments).output
        result = CliRunner().invoke(example.main, [f"--pipeline={tmp_path}", *arguments[1:]])
        assert result.exit_code == 2 and f"Error: {tmp_path} is not a diffusers pipeline" in result.output
        monkeypatch.setitem(sys.modules, "diffusers", None)
        assert "needs the package 'diffusers'" in CliRunner().invoke(example.main, arguments).output


@pytest.mark.parametrize(
    ("preset", "first_step", "heads"),
    [
        *[("gs", "none", []), ("ld3", "zero", []), ("full", "gaussian", []), ("amed-table", "zero", [])],
        *[("full", "gaussian", ["spatial", "time"]), ("gs", "none", ["time"]), ("gs", "none", ["blocks"])],
    ],
)
def test_span_student(preset, first_step, heads, tmp_path):
    """A table in the place of the predictor: the pipeline makes the images of the loop."""
    net = load_diffusers(pipeline_folder("sd"), guidance_rate=RATE)
    ends = {"sigma_min": net.sigma_min, "sigma_max": net.sigma_max}
    width = sum(layer.out_features for layer in shifted_layers(net, "blocks" in heads))
    sizes = {"img_channels": net.img_channels, "embedding_width": width}
    student = SpanSolver.preset(preset, num_steps=4, first_step=first_step, heads=heads, **sizes, **ends)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in student.groups().values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
        for value in student.head_parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    if first_step == "gaussian":
        student._set_gaussian(torch.randn(net.img_channels, SIZE, SIZE, generator=generator), torch.tensor(0.8))
    noise, cond = noise_like(net), net.make_cond(prompts=PROMPTS)
    expected, info = sample(net, noise.double(), solver="span", predictor=student, cond=cond, return_info=True)
    save_predictor(student, tmp_path / "predictor-000001.safetensors")
    network = net.pipeline.unet if first_step == "none" or heads else None
    scheduler = AMEDScheduler.from_predictor(tmp_path, net.pipeline.scheduler.config, network)
    assert len(scheduler) == student.evaluations() == info.nfe / 2
    for _ in range(2):
        assert relative_error(run_pipeline(net, scheduler, noise), expected.float()) < TOLERANCE
    with pytest.raises(UserError, match="only span solvers with parallel=1"):
        AMEDScheduler(SpanSolver(parallel=2), net.pipeline.scheduler.config)
    if {"time", "blocks"} & set(heads):
        unet, wrong = net.pipeline.unet, SpanSolver(heads=["time"], embedding_width=4)
        with torch.no_grad():
            student.shift_head.vectors.zero_()
        other = sample(net, noise.double(), solver="span", predictor=student, cond=cond)
        assert relative_error(other.float(), expected.float()) > 100 * TOLERANCE
        scheduler.detach()
        assert not any(layer._forward_hooks for layer in shifted_layers(net, True))
        with pytest.raises(UserError, match="network=pipe.unet"):
            run_pipeline(net, scheduler, noise)
        with pytest.raises(UserError, match="needs a noise embedding of 4 numbers"):
            AMEDScheduler(wrong, net.pipeline.scheduler.config, unet)
