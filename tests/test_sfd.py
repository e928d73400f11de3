"""SFD: numbers of the authors' training loop, and the whole way from the shell.

tests/golden/sfd holds numbers that the published code made in float64: its loop on a small analytic
network (toy) and on a U-Net (unet), with targets, states, losses, gradients and weights.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import amed
import compare
import sample as sample_cli
import train
from models import create_model
from models.denoiser import Denoiser
from models.edm import EDMDenoiser, load_edm_network, save_edm_safetensors
from models.few_step import FewStep
from solvers import sample
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.tensor_file import json_entry, read_safetensors
from training.low_rank import merged
from training.options import SFDOptions
from training.sfd_loss import SFDLoss
from training.sfd_trainer import SFDTrainer, make_student
from training.trainer import NotFinite

GOLDEN = Path(__file__).parent / "golden" / "sfd"
TOY, UNET = (json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("toy", "unet"))
ARRAYS = {name: np.load(GOLDEN / f"{name}.npz") for name in ("toy", "unet")}
CASES = {case["id"]: case for case in [*TOY["cases"], *UNET["cases"]]}


class Toy(Denoiser):
    """The analytic network of the numbers, in float64."""

    sigma_min, sigma_max, img_channels, img_resolution = 0.006, 80.0, 3, 4

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, torch.nn.Parameter(value.double()))

    def forward(self, x, sigma, class_labels=None, step_condition=None):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1, 1)
        q = sigma**2 + 0.25
        a = self.b1 + self.u * sigma.flatten()[0].log() / 4
        if step_condition is not None:
            a = a + self.v * step_condition / 10
        a = a[None]
        if class_labels is not None:
            a = a + class_labels.to(x.dtype) @ self.cls.T
        h = torch.tanh(F.conv2d(x / q.sqrt(), self.w1, padding=1) + a[:, :, None, None])
        return 0.25 / q * x + 0.5 * sigma / q.sqrt() * (F.conv2d(h, self.w2, self.b2, padding=1))


def array(name, key):
    return torch.from_numpy(ARRAYS[name][key])


def weights_of(name, prefix):
    keys = [key for key in ARRAYS[name].files if key.startswith(prefix)]
    return {key.removeprefix(prefix): array(name, key) for key in keys}


def enlarged_difference(x, target, cond):
    """The stand-in for LPIPS in the numbers, [B]."""
    a, b = (F.interpolate(v, (224, 224), mode="bilinear", align_corners=False) for v in (x, target))
    return (a - b).square().flatten(1).mean(dim=1)


class Forced(SFDTrainer):
    """The trainer with the number of time steps of each iteration of a case."""

    forced = None

    def steps_of(self, iteration):
        return self.forced[iteration]


def trainer_of(case, net, **more):
    numbers = [iteration["num_steps"] for iteration in case["iterations"]]
    names = ("M", "afs", "sampler_tea", "max_order")
    trainer = Forced(
        net,
        {name: case[name] for name in names if name in case},
        num_steps=sorted(set(numbers)),
        total=case.get("total_kimg", 1000) * 1000,
        lr=case["lr"],
        batch=case["batch"],
        **more,
    )
    trainer.forced = numbers
    return trainer


def toy_of(case_id):
    """The network that a case starts from, with ``few_step`` in a second stage."""
    case = CASES[case_id]
    first = case.get("second_stage_of")
    if first is None:
        return Toy(weights_of("toy", f"{case_id}.before."))
    last = len(CASES[first]["iterations"]) - 1
    net = Toy(weights_of("toy", f"{first}.after_it{last}."))
    # The published code does not check that the teacher was trained for the 7 time steps it makes.
    settings = trainer_of(CASES[first], toy_of(first), dtype=torch.float64).student.few_step
    net.few_step = type(settings)(**{**settings.to_dict(), "num_steps": [4, 7]})
    return net


def near(found, wanted, tolerance):
    """Whether all entries agree relative to the largest one."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    return float((found.detach().double() - wanted).abs().max()) <= tolerance * max(float(wanted.abs().max()), 1e-30)


def follow(trainer, case, name, states, gradients):
    """Runs the iterations of a case and compares every step. Returns nothing."""
    trainer_steps, recorded = trainer.optimizer.step, []
    trainer.optimizer.step = lambda: (
        recorded.append([p.grad.clone() for p in trainer.student.parameters()]),
        trainer_steps(),
    )
    for number, iteration in enumerate(case["iterations"]):
        key = f"{case['id']}.it{number}"
        latents, loss = array(name, f"{case['id']}.latents")[number].to(trainer.dtype), trainer.losses[0]
        assert near(loss.sigmas, array(name, f"{key}.sigmas"), 1e-12)
        labels = f"{case['id']}.labels"
        cond = {}
        if labels in ARRAYS[name].files:
            cond["class_labels"] = F.one_hot(array(name, labels)[number].long(), trainer.net.cls.shape[1]).double()
        targets = loss.run_teacher(latents * loss.sigma_max, cond)
        assert near(targets.targets, array(name, f"{key}.targets"), states)
        outs, step_of = [], loss.student_step

        def noted(*arguments, step_of=step_of, outs=outs):
            outs.append(step_of(*arguments))
            return outs[-1]

        loss.student_step = noted
        rows = trainer.step([(latents, cond)], [targets])
        loss.student_step = step_of
        for k, step in enumerate(iteration["steps"]):
            error, out = outs[k]
            assert near(out, array(name, f"{key}.step{k}.out"), states), (key, k)
            sums = error.detach().flatten(1).sum(dim=1)
            wanted = "loss_per_sample" if loss.distance is not None else "l1_per_sample"
            assert near(sums, array(name, f"{key}.step{k}.{wanted}"), gradients), (key, k)
            assert float(rows[k, 0]) == pytest.approx(float(array(name, f"{key}.step{k}.{wanted}").mean()), rel=1e-4)
            if step["trained"]:
                norms = torch.stack([gradient.norm() for gradient in recorded.pop(0)])
                assert near(norms, array(name, f"{key}.step{k}.grad_norms"), gradients), (key, k)
                assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(step["lr"])
        assert not recorded  # no step of Adam where nothing is trained
        yield number


@pytest.mark.parametrize("case_id", [case["id"] for case in TOY["cases"]])
def test_the_published_loop_on_the_toy_network(case_id):
    case = CASES[case_id]
    second = "second_stage_of" in case
    net = toy_of(case_id)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    trainer = trainer_of(case, net, dtype=torch.float64, distance=enlarged_difference if second else None)
    for number in follow(trainer, case, "toy", 1e-9, 1e-9):
        for name, value in trainer.student.state_dict().items():
            after = array("toy", f"{case_id}.after_it{number}.{name}")
            assert float((value - after).abs().max()) <= 1e-6 * case["lr"], (number, name)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # the teacher's
    assert trainer.student.few_step.step_condition == (case_id in ("v0", "s1"))
    latents = array("toy", f"{case_id}.sample.latents").double()
    for key in (key for key in ARRAYS["toy"].files if key.startswith(f"{case_id}.sample.final")):
        steps = key.rpartition(".step")[2] if ".step" in key else case["num_steps"]
        assert near(sample(trainer.student, latents, num_steps=int(steps)), array("toy", key), 1e-9), key


@pytest.mark.parametrize("case_id", [case["id"] for case in UNET["cases"]])
def test_the_published_loop_on_a_u_net(case_id):
    case = CASES[case_id]
    net = EDMDenoiser(**UNET["init_kwargs"], step_condition=True).eval()
    weights = weights_of("unet", f"{UNET['weights_of'].get(case_id, case_id)}.before.")
    net.load_state_dict(weights, strict=False)
    trainer = trainer_of(case, net.requires_grad_(False))
    assert [name for name, _ in trainer.student.named_parameters()] == case["parameter_order"]
    assert list(follow(trainer, case, "unet", 1e-4, 2e-4)) == [0, 1]
    moved = {name: value.detach() - weights[name] for name, value in trainer.student.named_parameters()}
    deltas = weights_of("unet", f"{case_id}.delta_after_it1.")
    idle = {name for name, value in moved.items() if not value.any()}
    assert idle == set(case["iterations"][0]["steps"][-1]["no_gradient"])  # without use: they do not move
    found, wanted = (torch.cat([part[name].flatten() for name in deltas]) for part in (moved, deltas))
    assert F.cosine_similarity(found, wanted, dim=0) > 0.999
    assert ((found - wanted).abs() > case["lr"] / 2).float().mean() < 0.005
    latents = array("unet", f"{case_id}.sample.latents")
    for key in (key for key in ARRAYS["unet"].files if key.startswith(f"{case_id}.sample.final")):
        steps = key.rpartition(".step")[2] if ".step" in key else case["num_steps"]
        assert near(sample(trainer.student, latents, num_steps=int(steps)), array("unet", key), 1e-3), key


def test_the_step_condition_of_a_u_net():
    net = EDMDenoiser(**UNET["init_kwargs"], step_condition=True).eval()
    net.load_state_dict(weights_of("unet", "n0.before."), strict=False)
    x = array("unet", "song.x")
    for sigma in (0.05, 1.5, 40):
        for step in (None, 4, 6):
            told = {} if step is None else {"step_condition": step}
            wanted = array("unet", f"song.D.sigma{sigma}.step{step}")
            assert near(net(x * sigma, torch.tensor(sigma), **told), wanted, 1e-5)


# ------------------------------------------------------------------------------------------------
# Settings, files, and the whole way from the shell


def small_edm(path=None, **more):
    """An EDM network of 8x8 pixels with the weights of the numbers, without step layers."""
    net = EDMDenoiser(**{**UNET["init_kwargs"], **more})
    net.load_state_dict(weights_of("unet", "n0.before."), strict=False)
    net.eval().requires_grad_(False)
    if path is not None:
        save_edm_safetensors(net, path)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a network, ``net.safetensors``."""
    path = tmp_path_factory.mktemp("sfd")
    small_edm(path / "net.safetensors")
    return path


def run(folder, *arguments, model="net.safetensors", command=train.main):
    """(exit status, output) of a command line on the network in the folder."""
    usual = ["--dataset_name=custom", "--device=cpu", *([f"--model_path={folder / model}"] if model else [])]
    done = CliRunner().invoke(command, [*usual, *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, done.output


def trained(folder, name, *arguments, **more):
    """(network file, output) of a training in folder/name."""
    usual = (
        "--objective=sfd",
        "--batch=4",
        "--total_kimg=0.008",
        "--seed=1",
        "--nosubdir",
        f"--outdir={folder / name}",
    )
    code, output = run(folder, *usual, *arguments, **more)
    assert code == 0, output
    return max((folder / name).glob("network-*.safetensors")), output


def same(one, other):
    first, second = (load_edm_network(path).state_dict() for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_published_settings():
    first, second = SFDOptions("cifar10"), SFDOptions("cifar10", teacher="x")
    variable = SFDOptions("cifar10", num_steps="4-7")
    found = [
        (o.total_kimg, o.lr, o.step_numbers(), o.M, o.afs, o.sampler_tea, o.batch) for o in (first, variable, second)
    ]
    assert found == [
        (200, 5e-5, [4], 3, True, "dpmpp", 128),
        (800, 5e-5, [4, 5, 6, 7], 3, True, "dpmpp", 128),
        (2000, 5e-4, [3], 2, True, "euler", 128),
    ]
    assert first.max_order == 3 and first.thresholding and first.lower_order_final and first.predict_x0
    loss = SFDLoss(small_edm(), first.loss_config())
    assert float(loss.sigmas[-1]) == pytest.approx(0.006) and len(loss.teacher_sigmas) == 13
    trainer = SFDTrainer(small_edm(), {}, num_steps=[4], total=200_000, batch=128)
    rates = [trainer.rate_of(iteration) for iteration in (0, 782, 783, 1562)]
    assert rates == pytest.approx([5e-5, 5e-5, 5e-6, 5e-6])


def test_the_number_of_steps_depends_on_seed_and_iteration():
    trainers = [SFDTrainer(small_edm(), {}, num_steps=range(4, 8), total=8, batch=4, seed=seed) for seed in (0, 0, 1)]
    drawn = [[trainer.steps_of(iteration) for iteration in range(40)] for trainer in trainers]
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0]) == {4, 5, 6, 7}


def test_from_training_to_images(folder):
    network, output = trained(folder, "first", "--num_steps=4")
    assert "NFE=2" in output and "12 evaluations of the teacher" in output and "million trained weights" in output
    net = load_edm_network(network)
    assert net.few_step.to_dict() == {
        **{"num_steps": [4], "solver": "euler", "afs": True, "schedule_type": "polynomial", "schedule_rho": 7},
        **{"sigmas": None, "step_condition": False},
    }
    assert (net.sigma_min, net.sigma_max) == (0.006, 80)
    provenance = json_entry(read_safetensors(network.read_bytes(), "")[1], "provenance", "")
    assert provenance["kimg"] == 0.008 and provenance["objective"] == "sfd"
    assert provenance["network_hash"] == sha256_of(folder / "net.safetensors")

    start = load_edm_network(folder / "net.safetensors")
    assert not torch.equal(net.model.map_layer0.weight, start.model.map_layer0.weight)
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x, info = sample(net, latents, return_info=True)
    assert info.nfe == 2 and torch.equal(x, sample(net, latents, nfe=2))
    assert torch.equal(x, sample(start, latents, solver="euler", num_steps=4, afs=True, sigma_min=0.006)) is False
    for wrong in (
        {"nfe": 3},
        {"num_steps": 5},
        {"solver": "heun", "num_steps": 4},
        {"nfe": 2, "denoise_to_zero": True},
    ):
        with pytest.raises(UserError, match="fine-tuned for 2 evaluations"):
            sample(net, latents, **wrong)

    images = ("--seeds=0-1", f"--outdir={folder / 'images'}")
    code, output = run(folder, *images, model=network, command=sample_cli.main)
    assert code == 0 and "NFE=2" in output, output
    for wrong in ("--nfe=3", "--solver=heun", "--search=rollover"):
        more = ("--verifier=nope:x", "--budget=9") if "search" in wrong else ()
        code, output = run(folder, *images, wrong, *more, model=network, command=sample_cli.main)
        assert code == 2 and output.count("\n") == 1, output
    code, output = run(folder, "--objective=sfd", model=network)
    assert code == 2 and "give it as --teacher" in output
    code, output = run(folder, "--sampler_stu=amed", "--num_steps=3", model=network)
    assert code == 2 and "original network" in output


def test_a_first_stage_has_l1_alone_unless_terms_are_given(folder):
    plain, without, features = (
        trained(folder, name, "--num_steps=3", "--feature_sigma=0.5", *more)[0]
        for name, more in (("l1", []), ("l1-given", ["--loss=none"]), ("l1-features", ["--loss=0.5*features"]))
    )
    assert same(plain, without) and not same(plain, features)


def test_one_network_for_several_numbers_of_steps_and_the_second_stage(folder):
    network, _ = trained(folder, "variable", "--num_steps=6-7", "--M=1")
    net = load_edm_network(network)
    assert net.few_step.num_steps == [6, 7] and net.few_step.step_condition
    names = {name for name in net.state_dict() if "step" in name}
    assert {"model.map_step_layer0.weight", "model.dec.8x8_up.affine_step.bias"} <= names
    latents, told = torch.randn(1, 3, 8, 8), []
    net.register_forward_pre_hook(lambda m, a, kwargs: told.append(kwargs.get("step_condition")), with_kwargs=True)
    sample(net, latents, nfe=4)
    sample(net, latents, nfe=5)
    assert told == [6] * 4 + [7] * 5
    with pytest.raises(UserError, match="give num_steps"):
        sample(net, latents)

    second = (f"--teacher={network}", "--loss=none")
    final, output = trained(folder, "second", *second, model=None)
    net = load_edm_network(final)
    assert net.few_step.num_steps == [3] and net.few_step.step_condition and "NFE=1" in output
    assert sample(net, latents, return_info=True)[1].nfe == 1
    code, output = run(folder, f"--resume={folder / 'second'}", "--total_kimg=0.012", model=None)
    assert code == 0 and "0.012" in output, output
    with_features, _ = trained(folder, "features", second[0], "--feature_sigma=0.5", model=None)
    assert not same(final, with_features)
    for wrong, message in (
        ("--num_steps=4", "needs a first stage with 10 time steps"),
        ("--schedule_rho=5", "leave it out"),
        ("--sampler_tea=heun", "makes its own steps"),
    ):
        code, output = run(folder, "--objective=sfd", second[0], wrong, f"--outdir={folder / 'no'}", model=None)
        assert code == 2 and message in output, output
    code, output = run(folder, "--objective=sfd", f"--teacher={folder / 'net.safetensors'}", model=None)
    assert code == 2 and "not a network of --objective=sfd" in output
    assert not (folder / "no").exists()


def test_a_resumed_run_and_stored_trajectories_give_the_same_network(folder):
    usual = ("--num_steps=3-4", "--M=1", "--total_kimg=0.016", "--teacher_cache=8", "--dropout=0.2")
    straight, _ = trained(folder, "straight", *usual)
    trained(folder, "parts", *usual[:2], "--total_kimg=0.008", *usual[3:], "--lr_final=1")
    whole, _ = trained(folder, "whole", *usual, "--lr_final=1")
    code, output = run(folder, f"--resume={folder / 'parts'}", "--total_kimg=0.016")
    assert code == 0, output
    assert same(whole, folder / "parts" / whole.name)
    assert not same(whole, straight)  # the rate is lower in the second half
    code, output = run(folder, f"--resume={folder / 'parts'}", "--rank=2")
    assert code == 2 and "rank=None" in output


def test_micro_batches_give_the_gradients_of_the_batch(folder):
    one, _ = trained(folder, "one", "--num_steps=3")
    two, _ = trained(folder, "two", "--num_steps=3", "--batch-gpu=1", "--checkpointing=True")
    first, second = (load_edm_network(path) for path in (one, two))
    latents = torch.randn(2, 3, 8, 8)
    assert torch.allclose(sample(first, latents), sample(second, latents), atol=1e-3)


def test_low_rank_adapters_are_part_of_the_result(folder):
    network, output = trained(folder, "low", "--num_steps=3-4", "--M=1", "--rank=2", "--lr=1e-3")
    net, start = load_edm_network(network), load_edm_network(folder / "net.safetensors")
    assert "0.01" in output.split("million trained weights")[0].split(";")[-1] or "0.0" in output
    before = start.state_dict()
    changed = {
        name for name, value in net.state_dict().items() if name in before and not torch.equal(value, before[name])
    }
    assert changed and all(name.endswith(".weight") and "norm" not in name for name in changed)
    name = "model.enc.8x8_block0.conv0.weight"
    difference = (net.state_dict()[name] - before[name]).flatten(1)
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 2
    student = make_student(start, False, rank=2)
    x, sigma = torch.randn(1, 3, 8, 8), torch.tensor(1.0)
    assert torch.equal(student(x, sigma), start(x, sigma)) and torch.equal(merged(student)(x, sigma), start(x, sigma))


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(folder):
    trainer = SFDTrainer(small_edm(), {"M": 1}, num_steps=[4], total=8, batch=2)
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    bad = torch.full((2, 3, 8, 8), torch.nan)
    with pytest.raises(NotFinite):
        trainer.step([(bad, {})])
    assert all(torch.equal(value, before[name]) for name, value in trainer.student.state_dict().items())
    assert trainer.iteration == 0 and not trainer.optimizer.state


def test_mixed_precision_trains_weights_of_full_precision(folder):
    network, _ = trained(folder, "half", "--num_steps=3", "--amp=bf16")
    net, start = load_edm_network(network), load_edm_network(folder / "net.safetensors")
    moved = (net.model.map_layer0.weight - start.model.map_layer0.weight).abs()
    assert 0 < float(moved.max()) <= 2 * 5e-5  # finer than the grid of bf16 near these weights
    assert net.model.map_layer0.weight.dtype == torch.float32


def test_compare_measures_a_few_step_network(folder):
    digits = ("--dataset_name=digits", "--device=cpu")
    flags = ("--objective=sfd", "--num_steps=3", "--M=0", "--batch=1", "--total_kimg=0.001", "--nosubdir")
    done = CliRunner().invoke(train.main, [*digits, *flags, f"--outdir={folder / 'digits'}"])
    assert done.exit_code == 0, done.output
    (network,) = (folder / "digits").glob("network-*")
    usual = (*digits, f"--model_path={network}", "--num=4", f"--outdir={folder / 'comparison'}", "--nfe=1,3")
    done = CliRunner().invoke(compare.main, [*usual, "--solvers=euler,heun", "--num_reference=4"])
    assert done.exit_code == 2 and "no reference solution" in done.output
    done = CliRunner().invoke(compare.main, usual)
    assert done.exit_code == 0 and "left out heun" in done.output and "1 of 1 rows computed" in done.output


def test_distillation_from_python(folder):
    net = create_model("custom", folder / "net.safetensors")
    few = amed.distill(net, objective="sfd", num_steps=4, M=1, batch=2, total_kimg=0.002, seed=0)
    assert few.few_step.num_steps == [4] and net.few_step is None
    last = amed.distill(few, objective="sfd", num_steps=2, M=2, afs=False, batch=2, total_kimg=0.002, loss="none")
    assert list(last.few_step.evaluations()) == [1]


def test_metadata_of_a_damaged_file():
    for wrong in ({}, {"num_steps": []}, {"num_steps": [2]}, {"num_steps": ["x"]}, {"num_steps": [4], "nope": 1}):
        with pytest.raises(UserError):
            FewStep.from_metadata(wrong)
    with pytest.raises(UserError, match="does not belong"):
        FewStep([4], sigmas=[80, 1, 0.1])


def test_errors_of_the_command_line(folder):
    for wrong, message in (
        (["--num_steps=2"], "makes no evaluation"),
        (["--num_steps=7-4"], "must be larger"),
        (["--sampler_stu=amed"], "leave --sampler_stu out"),
        (["--scale_dir=0.1"], "belongs to --objective=per_step"),
        (["--heads=time"], "belongs to --objective=final"),
        (["--loss=nope"], "unknown term 'nope'"),
        (["--compile"], "not compiled"),
    ):
        code, output = run(folder, "--objective=sfd", *wrong, f"--outdir={folder / 'none'}")
        assert code == 2 and message in output, output
    code, output = run(folder, "--num_steps=4-7", f"--outdir={folder / 'none'}")
    assert code == 2 and "only --objective=sfd" in output
    assert not (folder / "none").exists()
