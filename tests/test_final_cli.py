"""train.py --objective=final through the real command line, on a tiny network."""

import json

import pytest
import torch
from test_train_cli import invoke, trained
from test_training_loop import write_tiny
from toy import ToyNet
from two_processes import call_on_two

from models.edm import EDMDenoiser
from torch_utils.errors import UserError
from train import main
from training.checkpoint import load_predictor
from training.options import SpanOptions
from training.run_folder import load_newest_state
from training.span_run import train_span


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny("edm_song_cond", tmp_path_factory.mktemp("net") / "tiny.safetensors")


def usual(tiny, outdir) -> list[str]:
    places = [f"--model_path={tiny}", f"--outdir={outdir}", "--device=cpu", "--dataset_name=custom", "--seed=7"]
    sizes = ["--pairs=8", "--val_pairs=4", "--batch=4", "--num_steps_tea=4", "--num_steps=3", "--total_kimg=0.016"]
    return ["--sampler_stu=span", *places, *sizes, "--val_every=2", "--init=preset"]


def test_two_processes_give_the_student_of_one(tiny, tmp_path):
    """Class-conditional, with every part of the loss; the same up to rounding."""
    parts = ["--w_dist=0.1", "--w_anchor=0.1", "--w_delta=0.01", "--loss=features+huber", "--preset=full"]
    two = call_on_two(main, *usual(tiny, tmp_path), *parts, "--tick=0.004")
    assert two.codes == [0, 0], two.outputs
    output = "".join(two.outputs)
    path = trained(output)
    state = load_newest_state(path.parent)
    one = train_span({**state["options"], "outdir": str(tmp_path / "one")})
    other = load_newest_state(one.parent)
    assert state["iteration"] == other["iteration"] == 4
    for name, value in other["predictor"].items():
        torch.testing.assert_close(state["predictor"][name], value, rtol=1e-3, atol=1e-4)
    assert state["validation"] == pytest.approx(other["validation"], rel=1e-3)
    torch.testing.assert_close(state["queue"], other["queue"], rtol=1e-2, atol=1e-3)
    assert output.count("teacher pairs: ") == 1


def test_defaults_and_flags_reach_the_run(tiny, tmp_path):
    done = invoke("--dataset_name=digits", "--sampler_stu=span", f"--outdir={tmp_path / 'exps'}", "-n")
    assert done.exit_code == 0, done.output
    options = json.loads(done.output[: done.output.rindex("}") + 1])
    expected = {"objective": "final", "preset": "full", "batch": 32, "afs": None, "loss": None, "heads": None}
    assert expected.items() <= options.items() and "lr" not in options and "M" not in options
    assert "00000-digits-5-3-span-full-deis" in done.output and not list(tmp_path.iterdir())
    flags = {
        "preset": "dyweight",
        "sigma_scale_bound": 0.4,
        "afs": False,
        "sampler_tea": "ipndm",
        "schedule_tea": "logsnr",
        "lrs": "knots=0.02",
        "loss": "l2",
        "lr_final": 0.5,
        "warmup": 2,
        "clip": 0.5,
        "ema": 0.5,
        "phases": "all:1",
        "checkpointing": True,
        "teacher_set": str(tmp_path / "set.safetensors"),
        "sigmas": "80,1,0.002",
    }
    written = [f"--{key}={value}" for key, value in flags.items()]
    arguments = [
        argument for argument in usual(tiny, tmp_path) if "init" not in argument and "num_steps=" not in argument
    ]
    done = invoke(*arguments, "--objective=final", *written, "--batch-gpu=2", "--nosubdir")
    assert done.exit_code == 0, done.output
    path = trained(done.output)
    assert path.parent == tmp_path and (tmp_path / "set.safetensors").is_file()
    student = load_predictor(path)
    assert (
        student.config["first_step"] == "none"
        and student.config["sigma_scale_bound"] == 0.4
        and student.config["preset"] == "dyweight"
        and student.evaluations() == 2
    )
    recorded = json.loads((tmp_path / "training_options.json").read_text())
    assert {**flags, "sigmas": [80.0, 1.0, 0.002], "batch_gpu": 2}.items() <= recorded.items()


def test_heads_and_loss_that_are_not_given_suit_the_network(tiny, tmp_path):
    for preset, heads in (("full", "spatial,time"), ("gs", "none")):
        done = invoke(*usual(tiny, tmp_path), f"--preset={preset}")
        assert done.exit_code == 0, done.output
        path = trained(done.output)
        recorded = json.loads((path.parent / "training_options.json").read_text())
        assert (recorded["heads"], recorded["loss"]) == (heads, "features+0.2*huber")
        assert ",".join(load_predictor(path).config["heads"]) == heads.replace("none", "")
    done = invoke(*usual(tiny, tmp_path), "--heads=blocks")
    assert done.exit_code == 0, done.output
    learned = load_predictor(trained(done.output)).shift_head.vectors
    assert learned.shape[1] > 64 and learned.abs().min(dim=1).values.max() > 0  # trained in every block

    class Blind(ToyNet):
        def forward(self, x, sigma):
            return x * 0.5

    options = SpanOptions("custom").resolved(Blind(torch.float32))
    assert (options.heads, options.loss) == ("spatial", "huber")
    assert SpanOptions("custom", heads="sample", loss="l2").resolved(Blind(torch.float32)).loss == "l2"
    with pytest.raises(UserError, match="features at sigma=100"):
        SpanOptions("custom", feature_sigma=100.0).resolved(Blind(torch.float32))


def test_micro_batches_that_fit(tiny, tmp_path, monkeypatch):
    """Networks that take two samples at most, then one with gradients; at the start or later."""
    forward, most, graded = EDMDenoiser.forward, 2, 2

    def small(net, x, *arguments, **named):
        if len(x) > (graded if torch.is_grad_enabled() and x.requires_grad else most):
            raise torch.OutOfMemoryError("out of memory")
        return forward(net, x, *arguments, **named)

    monkeypatch.setattr(EDMDenoiser, "forward", small)
    heads = [*usual(tiny, tmp_path / "auto"), "--heads=spatial,time", "--loss=features"]
    refused = invoke(*heads)
    assert refused.exit_code == 2
    assert refused.output.splitlines()[-1] == "Error: cpu is out of memory: lower --batch-gpu (now 4)"
    done = invoke(*heads, "--batch-gpu=auto")
    assert done.exit_code == 0, done.output
    assert "4 samples at once do not fit into the memory of cpu" in done.output and "(2 per call" in done.output
    assert load_newest_state(trained(done.output).parent)["options"]["batch_gpu"] == 2
    graded = 1
    several = [argument for argument in heads if "init" not in argument]
    refused = invoke(*several, "--batch-gpu=2", "--init=ab,dpmpp", "--init_trial=0.5")
    assert refused.exit_code == 2
    assert refused.output.splitlines()[-1] == "Error: cpu is out of memory: lower --batch-gpu (now 2)"
    most, graded = 0, 0
    hopeless = invoke(*heads, "--batch-gpu=auto")
    assert hopeless.exit_code == 2 and "out of memory even with --batch-gpu=1" in hopeless.output.splitlines()[-1]


def test_continuing_from_the_command_line(tiny, tmp_path, monkeypatch):
    (tmp_path / "own_features.py").write_text("def pixels(net):\n    return lambda images: images.flatten(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = "--loss=own_features:pixels+huber"
    done = invoke(*usual(tiny, tmp_path), own, "--total_kimg=0.008", "--dump=1", "--tick=0.004")
    assert done.exit_code == 0, done.output
    folder = trained(done.output).parent
    for arguments, message in (
        (["--total_kimg=0.012"], "your own code; repeat --loss='own_features:pixels+huber' to run it"),
        (["--total_kimg=0.012", "--loss=l2"], "this run has loss=own_features:pixels+huber, not l2"),
        (["--total_kimg=0.012", own, "--M=1"], "this run has --objective=final, without --M; leave it out"),
        (["--total_kimg=0.012", own, "--objective=per_step"], "has objective=final, not per_step"),
        ([own], "has reached 0.008 kimg"),
    ):
        again = invoke(f"--resume={folder}", *arguments)
        assert again.exit_code == 2 and message in again.output.splitlines()[-1], again.output
    again = invoke(f"--resume={folder}", "--total_kimg=0.012", own, "--sampler_stu=span", "--device=cpu")
    assert again.exit_code == 0, again.output
    assert load_newest_state(folder)["iteration"] == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--objective=final", "--sampler_stu=amed"],
            "--objective=final trains span solvers: use --sampler_stu=span, not amed",
        ),
        (["--objective=per_step", "--sampler_stu=span"], "it needs --objective=final"),
        (["--objective=final", "--M=2"], "--M belongs to --objective=per_step: leave it out"),
        (["--sampler_stu=span", "--lr=0.1"], "--lr belongs to --objective=per_step: leave it out"),
        (["--loss=l2"], "--loss belongs to --objective=final: leave it out"),
        (["--sampler_stu=ipndm", "--preset=ld3"], "--preset belongs to --objective=final"),
        (["--sampler_tea=evodiff"], "--sampler_tea=evodiff can only make the pairs of --objective=final"),
        (["--sampler_stu=span", "--sampler_tea=amed"], "'--sampler_tea'"),
        (["--sampler_stu=span", "--preset=best"], "'--preset'"),
        (["--sampler_stu=span", "--loss=l3"], "unknown term 'l3'"),
        (["--sampler_stu=span", "--loss=lpips*2"], "unknown term '2'|weight above 0"),
        (["--sampler_stu=span", "--w_dist=-1"], "'--w_dist'"),
        (["--sampler_stu=span", "--init=ab@x"], "unknown grid 'x'"),
        (["--sampler_stu=span", "--lrs=x=1"], "'x=1' should be group=rate"),
        (["--sampler_stu=span", "--phases=x"], "should be groups:share"),
        (["--sampler_stu=span", "--num_steps=2"], "would not evaluate the network|nothing to learn"),
        (["--sampler_stu=span", "--sigmas=2,1", "--schedule_type=logsnr"], "--sigmas replaces --schedule_type"),
        (["--sampler_stu=span", "--pairs=4"], "pairs=4 must be at least the batch, 32"),
    ],
)
def test_mistakes_get_one_line(arguments, message, tmp_path):
    exps = tmp_path / "exps"
    done = invoke("--dataset_name=digits", *arguments, f"--outdir={exps}")
    last = done.output.strip().splitlines()[-1]
    assert done.exit_code == 2 and any(part in last for part in message.split("|")), done.output
    assert not exps.exists()


def test_flags_without_effect_are_pointed_out(tmp_path):
    arguments = ["--dataset_name=digits", "--sampler_stu=span", f"--outdir={tmp_path}", "-n", "--loss=huber"]
    done = invoke(*arguments, "--anchor=0.3", "--feature_sigma=0.1", "--init=preset", "--init_pairs=3")
    assert done.exit_code == 0
    for name in ("anchor", "feature_sigma", "init_pairs"):
        assert f"Note: --{name} has no effect" in done.output
