"""What would go wrong or be slow on a GPU, tested without one (pretend_device.py).

Nothing mixes devices or needs float64 where there is none. A run of a solver may wait for the
device a few times, but not at every step. Its noise levels are numbers, which cost no kernels.
"""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_device import PretendedDevice

from models import build_denoiser
from models.denoiser import Denoiser
from solvers import SOLVERS, sample
from solvers.search.problem import Problem
from solvers.span_table import PRESETS, SpanSolver
from torch_utils.seeds import SeededGenerators
from training import ld3
from training.amed_trainer import Distiller
from training.options import SpanOptions
from training.predictor import AMEDPredictor
from training.sfd_trainer import SFDTrainer
from training.span_search import head_sizes
from training.span_trainer import SpanTrainer
from training.teacher import teacher_set

ROOT = Path(__file__).resolve().parents[1]

KINDS = ("cuda", "mps")
SHAPE = (3, 16, 16)
# Kernels per network call outside of the network, for cases whose name contains the entry (the
# first that fits). A predictor makes noise levels per sample, whose arithmetic is on the device.
KERNELS = {
    **{"deis with": 91, "ipndm_v with": 46, "dpmpp with": 42, "amed with": 15, "with predictor": 21},
    **{"sample spatial time": 60, "parallel": 36, "span": 15},
    **{"euler afs": 5.2, "euler": 4.2, "heun": 5.6, "edm with noise": 7.2, "edm": 5.6, "dpm_v3": 24, "pfdiff": 5.8},
    **{"dpmpp plain": 12, "dpmpp noise": 12, "dpmpp": 18, "dpm": 5.6, "ipndm_v": 9.2, "ipndm": 9.2, "deis": 9.2},
    **{"unipc": 25, "evodiff": 58, "sde": 13},
}
WAITS_OF_A_RUN = 3  # before the first step
NETS = ROOT / "tests" / "golden" / "nets" / "tiny"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Halving(torch.nn.Module):
    """A denoiser that is not counted, so that what is counted is the solver."""

    sigma_min, sigma_max, img_channels, img_resolution, label_dim, evals_per_call = 0.002, 80.0, *SHAPE[:2], 0, 1
    dataset_name, weights_hash, data_std = None, None, 0.5

    def __init__(self, device):
        super().__init__()
        self.bottleneck, self.noise_embedding = torch.nn.Identity(), torch.nn.Linear(4, 8)
        self.data_mean, self.device, self.calls = torch.zeros(3, 1, 1), device, 0

    def forward(self, x, sigma, **cond):
        self.calls += 1
        with self.device.silent():
            self.bottleneck(x[:, :, :8, :8])
            self.noise_embedding(x.new_zeros(1, 4))
            return 0.5 * x.to(torch.float32)


def predictor(solver, steps, **more):
    return AMEDPredictor(sampler_stu=solver, num_steps=steps, scale_dir=0.01, scale_time=0.1, **more)


def student(preset, steps, heads=(), **more):
    made = SpanSolver.preset(preset, num_steps=steps, heads=list(heads), img_channels=3, embedding_width=8, **more)
    if made.config["first_step"] == "gaussian":
        made._set_gaussian(torch.zeros(SHAPE), torch.tensor(0.3))
    for number, parameter in enumerate(made.parameters()):  # as after training: no learned number is exactly 0 or 1
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(number)
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return made


def cases() -> dict:
    """Name -> what makes the arguments of ``sample`` from a number of time stamps."""
    found = {}
    for name, rule in SOLVERS.items():
        if not rule.needs_predictor and name != "dpm_v3":
            found[name] = lambda n, name=name: {"solver": name, "num_steps": n}
        if rule.can_learn and not rule.own_schedule:
            for afs in (False, True):
                found[f"{name} with predictor{' afs' * afs}"] = lambda n, name=name, afs=afs: {
                    "solver": name,
                    "num_steps": n,
                    "predictor": predictor(name, n, afs=afs),
                    "afs": afs,
                }
    more = {
        "edm with noise": {"solver": "edm", "S_churn": 10.0},
        "deis rhoab": {"solver": "deis", "deis_mode": "rhoab"},
        "deis original": {"solver": "deis", "original_code": True},
        "dpmpp plain": {"solver": "dpmpp", "thresholding": False},
        "dpmpp noise": {"solver": "dpmpp", "predict_x0": False},
        "dpm_v3 data": {"solver": "dpm_v3", "statistics": "data"},
        "pfdiff 3": {"solver": "pfdiff", "pfdiff_k": 3, "pfdiff_h": 2},
        "euler afs": {"solver": "euler", "afs": True},
        "euler afs data": {"solver": "euler", "afs": "data"},
        "ipndm time_uniform": {"solver": "ipndm", "schedule_type": "time_uniform", "schedule_rho": 1},
        "heun denoised": {"solver": "heun", "denoise_to_zero": True, "return_trajectory": True},
    }
    found |= {name: lambda n, values=values: {**values, "num_steps": n} for name, values in more.items()}
    found["euler sigmas_net"] = lambda n: {
        "solver": "euler",
        "sigmas": torch.logspace(1.9, -2, n, dtype=torch.float64).tolist(),
        "sigmas_net": torch.logspace(1.8, -2.1, n, dtype=torch.float64).tolist(),
    }
    for preset in PRESETS:
        for heads in ((), ("sample", "spatial", "time")):
            name = " ".join(["span", preset, *heads])
            found[name] = lambda n, preset=preset, heads=heads: {
                "solver": "span",
                "predictor": student(preset, n, heads),
            }
    found["span full parallel"] = lambda n: {"solver": "span", "predictor": student("full", n, parallel=2)}
    return found


CASES = cases()


@torch.no_grad()
def run(kind, case, steps):
    """(images, device, network calls) of a run; what is counted begins with it."""
    torch.manual_seed(0)
    with PretendedDevice(kind, ROOT) as device:
        net = Halving(device).to(kind)
        arguments = CASES[case](steps)
        if "predictor" in arguments:
            arguments["predictor"] = arguments["predictor"].to(kind)
        latents = SeededGenerators(range(2)).randn(SHAPE).to(kind)
        device.clear()
        images = sample(net, latents, **arguments)
        assert images.device == device.device and images.dtype == torch.float32
        calls = net.calls
        with device.silent():
            images = images.cpu()
    return images, device, calls


@torch.no_grad()
def on_the_cpu(case, steps):
    class Plain:
        silent = staticmethod(nullcontext)

    torch.manual_seed(0)
    net = Halving(Plain)
    arguments = CASES[case](steps)
    return sample(net, SeededGenerators(range(2)).randn(SHAPE), **arguments)


def listed(counter):
    return [f"{count} x {what} ({line})" for (what, line), count in counter.most_common(12)]


def test_the_pretended_device():
    with PretendedDevice("cuda", ROOT) as gpu:
        x = torch.randn(3, device="cuda", requires_grad=True)
        assert x.device == torch.device("cuda", 0) and (x * 2).is_cuda and not gpu.waits
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: torch.stack([x[0], torch.ones(())]),
            lambda: x.detach().numpy(),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
        with pytest.raises(RuntimeError):
            torch.randn(3, generator=torch.Generator(), device="cuda")
        (x * torch.tensor(3.0)).sum().backward()
        assert x.grad.is_cuda and not gpu.waits
        assert x.grad.tolist() == [3.0] * 3 and bool((x.grad > 2).all()) and sum(gpu.waits.values()) == 2
        gpu.clear()
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
        assert not gpu.waits
        torch.ones(2).to("cuda", non_blocking=True)
        x.new_tensor([1.0])
        x[x > 0]
        x[0].item()
        assert sum(gpu.waits.values()) == 4 and not gpu.doubles
        scale = torch.tensor(2.0, requires_grad=True)
        (scale * x.detach()).sum().backward()
        assert scale.grad.device.type == "cpu" and sum(gpu.waits.values()) == 5
    with PretendedDevice("mps"), pytest.raises(TypeError, match="float64"):
        torch.ones(2).to("mps").double()
    assert torch.ones(1).device.type == "cpu" and not torch.cuda.is_available()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_a_solver_runs_there(kind, case):
    """Without mixing devices, and with the images of the CPU."""
    images, _, _ = run(kind, case, 5)
    torch.testing.assert_close(images, on_the_cpu(case, 5), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
def test_a_solver_does_not_wait_at_every_step(case):
    (_, few, _), (_, many, _) = run("cuda", case, 5), run("cuda", case, 9)
    grown = {key: many.waits[key] - few.waits[key] for key in many.waits if many.waits[key] != few.waits[key]}
    assert not grown, [f"{count} more x {what} ({line})" for (what, line), count in grown.items()]
    assert sum(few.waits.values()) <= WAITS_OF_A_RUN, listed(few.waits)


@pytest.mark.parametrize("case", CASES)
def test_a_solver_computes_its_numbers_on_the_host(case):
    """No arithmetic in float64 on the device, and no more kernels than the images need."""
    _, device, calls = run("cuda", case, 7)
    assert not device.doubles, listed(device.doubles)
    allowed = next(count for part, count in KERNELS.items() if part in case)
    assert device.kernels <= allowed * calls, (
        f"{device.kernels / calls:.1f} per call, {device.operations.most_common(8)}"
    )


def tiny(name):
    facts = json.loads((NETS / name / "config.json").read_text())
    config = facts.get("init_kwargs") or {
        "model": facts["init_kwargs_model"],
        "classifier": facts["init_kwargs_classifier"],
    }
    weights, io = (
        {key: torch.from_numpy(value) for key, value in np.load(NETS / name / f"{part}.npz").items()}
        for part in ("weights", "io")
    )
    cond = {}
    if name.startswith("sd"):
        cond = {"condition": io["context"], "unconditional_condition": io["context_uncond"]}
    elif "class_labels" in io or "class_index" in io:
        cond = {"class_labels": io["class_labels"] if name.startswith("edm") else io["class_index"]}
    return name.partition("_")[0], config, weights, cond


FAMILIES = [
    (path.name, guidance)
    for path in sorted(NETS.iterdir())
    for guidance in ({"adm": ("none", "cg"), "sd": ("none", "cfg")}.get(path.name.partition("_")[0], (None,)))
]


SIGMAS = {
    "of the device": lambda kind: torch.tensor(2.0).to(kind),
    "for each sample": lambda kind: torch.tensor([2.0, 3.0]).to(kind),
}
SIGMAS |= {"of the host": lambda kind: torch.tensor(2.0), "a number": lambda kind: 2.0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, guidance", FAMILIES)
@torch.no_grad()
def test_a_network_does_not_wait(kind, name, guidance):
    """Whatever its noise level is, a tensor of the device or a number of the host."""
    family, config, weights, cond = tiny(name)
    with PretendedDevice(kind, ROOT) as device:
        cond = {key: value[:2].to(kind) for key, value in cond.items()}
        for form, level in SIGMAS.items():
            net = build_denoiser(family, config, weights, guidance, device=kind)
            x = torch.randn(2, net.img_channels, net.img_resolution, net.img_resolution).to(kind)
            net(x, torch.tensor(2.0).to(kind), **cond)  # tables are moved now
            sigma = level(kind)
            device.clear()
            assert net(x, sigma, **cond).device == device.device
            assert not device.waits and not device.doubles, form + listed(device.waits) + listed(device.doubles)
        net.decode(x)
    assert not device.waits and not device.doubles, listed(device.waits) + listed(device.doubles)


@pytest.fixture
def small():
    family, config, weights, _ = tiny("edm_song_uncond")
    return build_denoiser(family, config, weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student_solver, teacher", [("amed", "heun"), ("dpmpp", "dpmpp")])
def test_distillation(kind, student_solver, teacher, small):
    """An iteration waits for its statistics only."""
    with PretendedDevice(kind, ROOT) as device:
        config = {"sampler_stu": student_solver, "sampler_tea": teacher, "num_steps": 3, "afs": True, "scale_dir": 0.01}
        distiller = Distiller(small.to(kind), config, batch=1, seed=1, device=kind)
        distiller.iterate()
        device.clear()
        assert distiller.iterate()[:, 0].isfinite().all()
    assert sum(device.waits.values()) <= 1, listed(device.waits)


@pytest.mark.parametrize("kind", KINDS)
def test_fine_tuning_for_few_steps(kind, small):
    """An iteration waits for the loss of each trained interval, and for its statistics."""
    with PretendedDevice(kind, ROOT) as device:
        more = {"rank": 2} if kind == "mps" else {}
        trainer = SFDTrainer(small.to(kind), {"M": 1}, num_steps=(3,), total=4, batch=1, device=kind, **more)
        trainer.iterate()
        device.clear()
        assert trainer.iterate().isfinite().all()
    assert sum(device.waits.values()) <= 3, listed(device.waits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more",
    [{"heads": "none", "loss": "huber"}, {"heads": "sample,spatial,time", "w_dist": 0.1, "w_anchor": 0.1}],
    ids=["table", "everything"],
)
def test_training_on_final_samples(kind, more, small, tmp_path):
    """An iteration waits for its gradients, which come back in one copy, and for its losses."""
    with PretendedDevice(kind, ROOT) as device:
        net = small.to(kind)
        options = SpanOptions(
            **{
                "dataset_name": "digits",
                "seed": 3,
                "num_steps": 3,
                "pairs": 2,
                "val_pairs": 1,
                "batch": 2,
                "num_steps_tea": 5,
                "total_kimg": 0.08,
                "init": "preset",
                "val_every": 50,
                "loss": "features+0.2*huber",
                **more,
            }
        )
        pairs = teacher_set(net, options.teacher(0.002, 80.0), tmp_path / "set.safetensors", batch=2, device=kind)
        made = options.make_student(0.002, 80.0, **head_sizes(net, options))
        if made.config["first_step"] == "gaussian":
            made.measure_gaussian(net, calls=2)
        trainer = SpanTrainer(net, made, pairs, options, 20, kind)
        trainer.iterate()
        device.clear()
        trainer.iterate()
    assert sum(device.waits.values()) <= 3, listed(device.waits)


class Gaussian(Denoiser):
    """The denoiser of Gaussian data, with gradients to everything."""

    img_channels, img_resolution = 3, 8

    def forward(self, x, sigma, **cond):
        return x / (1 + 4 * sigma.reshape(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("solver", ["ipndm", "dpmpp", "heun"])
def test_ld3_waits_for_its_gradients_only(solver):
    """Those of the noise levels, and those of the levels for the network, each in one copy."""
    waits = []
    for steps in (4, 7):
        with PretendedDevice("cuda", ROOT) as device:
            problem = Problem(Gaussian(), solver, steps, batch=2, device="cuda")
            few = {"num_train": 2, "num_valid": 2, "update_batch": 2, "rounds_grid": 0, "num_steps_tea": 9}
            few |= {"solver_tea": "heun", "init": "polynomial", "loss": "l2"}
            trainer = ld3.Trainer(problem, {name: option.default for name, option in ld3.OPTIONS.items()} | few)
            trainer.deal()
            trainer.run_teacher()
            trainer.start()
            trainer.update(0)
            device.clear()
            trainer.update(0)
            assert not trainer.grid.v.detach().eq(0).all()
            waits.append(device.waits)
    assert waits[0] == waits[1] and sum(waits[0].values()) <= 2, listed(waits[1])


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *[(kind, method) for kind in KINDS for method in ("gits", "ofs")],
        ("cuda", "ld3"),
        pytest.param("mps", "ld3", marks=pytest.mark.slow),
    ],
)
def test_optimised_schedules(kind, method, tmp_path, monkeypatch):
    import optimize_schedule

    few = {"gits": ["--num_warmup=1", "--num_steps_tea=5"], "ofs": ["--num_warmup=1", "--num_steps_tea=5"]}
    few["ld3"] = [
        "--num_train=1",
        "--num_valid=1",
        "--update_batch=1",
        "--rounds=2",
        "--rounds_grid=1",
        "--num_steps_tea=4",
        "--init=logsnr",
    ]
    monkeypatch.chdir(tmp_path)
    arguments = [
        f"--method={method}",
        "--dataset_name=digits",
        "--num_steps=3",
        "--solver=euler",
        "--batch=1",
        "--dest=s.json",
    ]
    with PretendedDevice(kind, ROOT):
        optimize_schedule.main.main([*arguments, f"--device={kind}", *few[method]], standalone_mode=False)
    assert (tmp_path / "s.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "more", [[], ["--fid_ref=digits"], ["--candidates=2", "--verifier=classifier"], ["--S_churn=5"]]
)
def test_sampling(kind, more, tmp_path, monkeypatch):
    """A batch costs one wait: for its pixels, and whether they are finite."""
    import sample as command

    monkeypatch.chdir(tmp_path)
    with PretendedDevice(kind, ROOT) as device:
        solver = "edm" if "--S_churn=5" in more else "euler"
        arguments = [
            "--dataset_name=digits",
            f"--solver={solver}",
            "--num_steps=3",
            "--batch=2",
            f"--device={kind}",
            *more,
        ]
        waits = []
        for seeds in ("0-1", "0-5"):
            device.clear()
            command.main.main(
                [*arguments, f"--seeds={seeds}", *([] if "--fid_ref=digits" in more else [f"--outdir={seeds}"])],
                standalone_mode=False,
            )
            waits.append(device.waits)
    grown = waits[1] - waits[0]
    batches = 2 * (2 if "--candidates=2" in more else 1)
    each = 5 if "--candidates=2" in more else 2 if "--fid_ref=digits" in more else 1
    assert sum(grown.values()) <= each * batches, listed(grown)
