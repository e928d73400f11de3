"""A network of one's own: predictions against the closed form for Gaussian data, and its use.

It is sampled, distilled and compared from Python and from the command line.
"""

import json
import re

import pytest
import torch
from click.testing import CliRunner
from test_training_loop import write_tiny
from toy import ToyNet

import compare as compare_cli
import models
import sample as sample_cli
import train as train_cli
from models.noise import DiscreteTime
from solvers import SCHEDULES, sample
from solvers.span_table import SpanSolver
from tools.compare_models import compare
from torch_utils.errors import UserError
from training.checkpoint import find_predictor
from training.distill import distill
from training.predictor import AMEDPredictor

VARIANCE = 0.25  # of the data, independent normal values


def exact(x, sigma):
    """D(x; sigma), the mean of the data given x = data + sigma noise."""
    return x * VARIANCE / (VARIANCE + sigma**2)


def ddpm_table() -> torch.Tensor:
    return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)


# The mean of each target given z = a data + b noise, from the covariances of normal values.
def noise_mean(z, a, b):
    return b * z / (a**2 * VARIANCE + b**2)


def data_mean(z, a, b):
    return a * VARIANCE * z / (a**2 * VARIANCE + b**2)


TARGETS = {
    "epsilon": noise_mean,
    "x0": data_mean,
    "v": lambda z, a, b: a * noise_mean(z, a, b) - b * data_mean(z, a, b),
}


@pytest.mark.parametrize("prediction", TARGETS)
def test_predictions_on_a_table(prediction):
    table = ddpm_table().float().double()  # as checkpoints have it

    def model(z, index):
        assert index.shape == (len(z),)
        a2 = table[index.round().long()].reshape(-1, 1, 1, 1)
        return TARGETS[prediction](z, a2.sqrt(), (1 - a2).sqrt())

    net = models.wrap(model, prediction, noise=table)
    assert net.sigma_max == pytest.approx(((1 - table[-1]) / table[-1]).sqrt().item(), rel=1e-6)
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for index in (0, 17, 400, 999):
        sigma = ((1 - table[index]) / table[index]).sqrt()
        torch.testing.assert_close(net(x * sigma, sigma), exact(x * sigma, sigma), rtol=1e-5, atol=1e-6)


def test_predictions_with_a_time_of_functions():
    def model(z, t):  # a^2 = exp(-t)
        a2 = torch.exp(-t).reshape(-1, 1, 1, 1)
        return noise_mean(z, a2.sqrt(), (1 - a2).sqrt())

    noise = (lambda t: torch.expm1(t).sqrt(), lambda sigma: torch.log1p(sigma**2))
    net = models.wrap(model, "eps", noise=noise, sigma_min=0.01, sigma_max=50.0)
    x, sigma = torch.randn(4, 1, 2, 2, dtype=torch.float64), torch.tensor([0.01, 0.3, 7.0, 50.0])
    torch.testing.assert_close(net(x, sigma), exact(x, sigma.double().reshape(-1, 1, 1, 1)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("data_time", [0, 1])
def test_flow_matching(data_time):
    def model(y, time):
        t = (1 - time if data_time else time).reshape(-1, 1, 1, 1)
        flow = noise_mean(y, 1 - t, t) - data_mean(y, 1 - t, t)
        return -flow if data_time else flow

    net = models.wrap(model, "flow", data_time=data_time)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for sigma in (0.01, 1.0, 90.0):
        torch.testing.assert_close(net(x, sigma), exact(x, sigma), rtol=1e-6, atol=1e-8)


def test_the_network_of_edm_wrapped_is_itself():
    own = models.create_model("digits")
    net = models.wrap(own, shape=(1, 32), bottleneck=own.bottleneck)
    x = torch.randn(2, 1, 32, 32)
    images = (sample(network, x, solver="ipndm", num_steps=4) for network in (net, own))
    torch.testing.assert_close(*images, atol=1e-4, rtol=0)  # rounding: one noise level, or one for each image


class Conditional(torch.nn.Module):
    """eps of Gaussians whose mean is the number of their class; it looks the time up in a table."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(ddpm_table().float()[:, None])
        self.inner = torch.nn.ModuleDict({"mid": torch.nn.Conv2d(2, 2, 1)})

    def forward(self, z, index, y):
        assert index.dtype == torch.int64
        a = self.table(index).sqrt().reshape(-1, 1, 1, 1)
        self.inner["mid"](z)
        mean = a * y.to(z).reshape(-1, 1, 1, 1)
        return (z - mean) * (1 - a**2).sqrt() / (a**2 * VARIANCE + 1 - a**2), "more"


@pytest.fixture(scope="module")
def conditional():
    return models.wrap(
        *(Conditional(), "epsilon"),
        noise="ddpm",
        shape=(2, 16),
        label_dim=3,
        label_name="y",
        integer_time=True,
        bottleneck="inner.mid",
    )


def test_classes_and_whole_times(conditional):
    x = torch.randn(63, 2, 16, 16)
    images = sample(conditional, x, solver="heun", num_steps=12, cond={"y": torch.arange(63) % 3})
    means = images.mean(dim=(1, 2, 3)).reshape(-1, 3).mean(dim=0)
    torch.testing.assert_close(means, torch.tensor([0.0, 1.0, 2.0]), atol=0.05, rtol=0)
    with pytest.raises(UserError, match="class 3 is out of range"):
        conditional.make_cond(labels=3)


def test_a_predictor_knows_its_settings(conditional):
    x, cond = torch.randn(2, 2, 16, 16), {"y": torch.tensor([0, 2])}
    settings = {"num_steps": 4, "schedule_type": "time_uniform", "schedule_rho": 1.0, "afs": True, "max_order": 2}
    predictor = AMEDPredictor(sampler_stu="ipndm", sampler_tea="ipndm", **settings)
    expected = sample(conditional, x, solver="ipndm", predictor=predictor, cond=cond, **settings)
    found, info = predictor.sample(conditional, x, cond=cond, return_info=True)
    assert torch.equal(found, expected) and info.nfe == predictor.evaluations() == 5
    assert torch.equal(sample(conditional, x, predictor=predictor, cond=cond), expected)
    changes = {"solver": "dpmpp", "num_steps": 5, "schedule_type": "polynomial", "afs": False, "max_order": 3}
    for name, value in changes.items():
        with pytest.raises(UserError, match=f"{name}={value}"):
            predictor.sample(conditional, x, cond=cond, **{name: value})
    student = SpanSolver(num_steps=4, sigma_min=conditional.sigma_min, sigma_max=conditional.sigma_max)
    assert torch.equal(student.sample(conditional, x, cond=cond), student.run(conditional, x, cond))
    other = next(kind for kind in SCHEDULES if kind != student.config["schedule_type"])
    for name, value in {"num_steps": 5, "schedule_type": other, "sigma_max": 9.0, "afs": not student.afs}.items():
        with pytest.raises(UserError, match=name):
            student.sample(conditional, x, cond=cond, **{name: value})


def test_another_guidance_is_refused(conditional):
    predictor = AMEDPredictor(num_steps=3, guidance_type="cfg", guidance_rate=7.5)
    net = models.wrap(conditional.model, "epsilon", noise="ddpm", shape=(2, 16))
    net.guidance_rate = 3.0
    with pytest.raises(UserError, match="guidance_rate=7.5, the network has 3"):
        predictor.sample(net, torch.randn(1, 2, 16, 16))


@pytest.mark.parametrize(
    "options",
    [
        {"pairs": 16, "val_pairs": 8, "num_steps": 4, "total_kimg": 0.08, "init": "preset"},
        {"sampler_stu": "amed", "num_steps": 3, "total_kimg": 0.04},
    ],
    ids=["span", "amed"],
)
def test_distil_and_compare_from_python(conditional, options, tmp_path):
    weights = {name: value.clone() for name, value in conditional.state_dict().items()}
    predictor = distill(conditional, batch=8, seed=0, **options)
    assert all(torch.equal(value, weights[name]) for name, value in conditional.state_dict().items())
    assert predictor.provenance["network_hash"] == conditional.weights_hash
    assert predictor.config["dataset_name"] == "custom"
    rows = compare(
        *(conditional,),
        solvers=["euler", "ipndm"],
        nfe=predictor.evaluations(),
        predictors=[predictor],
        num=8,
        reference_steps=6,
        outdir=tmp_path,
    )
    assert len(rows) == 3 and all(row["fid"] is None and row["pixel"] > 0 and not row["command"] for row in rows)
    images = predictor.sample(conditional, torch.randn(2, 2, 16, 16), cond=conditional.make_cond(labels=[0, 1]))
    assert images.isfinite().all()
    page = (tmp_path / "index.html").read_text()
    assert "distance (pixels)" in page and "FID</th>" not in page


def test_what_is_missing_is_named(conditional):
    def plain(x, sigma):
        return exact(x, torch.as_tensor(sigma).reshape(-1, 1, 1, 1))

    x = torch.randn(1, 1, 4, 4)
    with pytest.raises(UserError, match="the network has no sigma_min: wrap it"):
        sample(plain, x, solver="euler", num_steps=3)
    assert sample(plain, x, solver="euler", num_steps=3, sigma_min=0.01, sigma_max=10).shape == x.shape
    with pytest.raises(UserError, match="give a solver"):
        sample(models.wrap(plain), x, num_steps=3)
    with pytest.raises(UserError, match=r"pass shape=\(3, 32\) to models.wrap"):
        distill(models.wrap(plain), sampler_stu="amed", batch=1)
    with pytest.raises(UserError, match="wrap the network first"):
        distill(plain)
    with pytest.raises(UserError, match="wrap the network first"):
        compare(ToyNet())
    with pytest.raises(UserError, match="no option 'total_kim'; did you mean total_kimg"):
        distill(conditional, total_kim=1)
    with pytest.raises(UserError, match="compress"):
        compare(conditional, compress=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prediction": "epsilo"}, "unknown prediction 'epsilo'; did you mean epsilon"),
        ({"prediction": "v"}, "needs noise="),
        ({"prediction": "flow", "noise": "ddpm"}, "leave noise out"),
        ({"noise": "ddpm"}, "needs no noise process"),
        ({"prediction": "eps", "noise": "ddmp"}, "unknown noise 'ddmp'; did you mean ddpm"),
        ({"prediction": "eps", "noise": object()}, "noise must be a table"),
        ({"prediction": "eps", "noise": (torch.exp, torch.log)}, "give sigma_min and sigma_max"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "0 < sigma_min < sigma_max"),
        ({"shape": (3, 8, 16)}, "square"),
        ({"label_dim": 2, "make_cond": dict}, "give one of them"),
        ({"bottleneck": "inner.mit"}, "no such module; did you mean inner.mid"),
        ({"data_time": 1}, "data_time=1"),
    ],
)
def test_mistakes_in_wrap(arguments, message):
    with pytest.raises(UserError, match=message):
        models.wrap(Conditional(), **arguments)
    with pytest.raises(UserError, match="must be a module or a function"):
        models.wrap(3)


def test_a_wrong_shape_is_explained():
    net = models.wrap(lambda x, sigma: x.repeat(1, 2, 1, 1))
    with pytest.raises(UserError, match=r"returned \[1, 6, 4, 4\] for an input \[1, 3, 4, 4\]"):
        sample(net, torch.randn(1, 3, 4, 4), solver="euler", num_steps=3)


def test_half_precision_keeps_the_time():
    seen = []

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, z, t):
            seen.append((z.dtype, t.dtype, t[0].item()))
            return z * self.weight

    net = models.wrap(Half(), "epsilon", noise=ddpm_table())
    sigma = DiscreteTime(ddpm_table()).sigma(torch.tensor(0.998, dtype=torch.float64))
    assert net(torch.zeros(1, 1, 2, 2), sigma).dtype == torch.float32
    assert seen[0][:2] == (torch.bfloat16, torch.float32) and seen[0][2] == pytest.approx(997, abs=0.01)


# Command lines

OWN = """
import torch, models

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.variance = torch.nn.Parameter(torch.tensor(0.25))

    def forward(self, x, sigma):
        return x * self.variance / (self.variance + sigma**2)

def make_net():
    print("own code runs")
    return models.wrap(Net(), shape=(1, 16), sigma_min=0.01, sigma_max=20)

def raw():
    return Net()
"""
TRAIN = ["--dataset_name=custom", "--total_kimg=0.008", "--batch=4", "--num_steps=3", "--seed=0", "--device=cpu"]


def call(program, *arguments) -> str:
    done = CliRunner().invoke(program.main, list(arguments), standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "people_own_net.py").write_text(OWN)
    return tmp_path


def test_a_run_remembers_the_file_of_its_network(here):
    write_tiny("edm_song_uncond", here / "net.safetensors")
    call(train_cli, *TRAIN, "--model_path=net.safetensors")
    call(sample_cli, "--predictor_path=0", "--seeds=0-1", "--device=cpu")
    assert len(list(here.glob("samples/custom/**/*.png"))) == 2
    compared = ["--solvers=euler", "--nfe=3", "--num=4", "--reference_steps=3", "--device=cpu"]
    out = call(compare_cli, "--dataset_name=custom", "--predictor_path=0", *compared)
    assert "AMED-Solver" in out and "distance (pixels)" in out and "FID by NFE" not in out
    (here / "net.safetensors").rename(here / "moved.safetensors")
    with pytest.raises(UserError, match="net.safetensors, which is not here: give --model_path"):
        call(sample_cli, "--predictor_path=0", "--seeds=2", "--device=cpu")
    (run,) = here.glob("exps/00000-*")
    (run / "training_options.json").unlink()
    with pytest.raises(UserError, match="is one of your own: give --model_path"):
        call(sample_cli, "--predictor_path=0", "--seeds=2", "--device=cpu")
    call(sample_cli, "--predictor_path=0", "--seeds=2", "--device=cpu", "--model_path=moved.safetensors")


def test_code_of_your_own_on_the_command_line(here):
    own = "--model_path=people_own_net:make_net"
    plain = ["--dataset_name=custom", "--solver=ipndm", "--num_steps=5", "--seeds=0-3", "--device=cpu"]
    assert "own code runs" in call(sample_cli, *plain, own)
    out = call(train_cli, *TRAIN, own)
    assert "people_own_net:make_net" in out
    predictor = ["--predictor_path=0", "--seeds=0-1", "--device=cpu"]
    with pytest.raises(UserError, match="is code of your own: repeat --model_path=people_own_net:make_net to run it"):
        call(sample_cli, *predictor)
    call(sample_cli, *predictor, own)
    # What a file says is never run: a run that is continued needs the flag as well.
    with pytest.raises(UserError, match="repeat --model_path"):
        call(train_cli, "--resume=0", "--total_kimg=0.016", "--device=cpu")
    call(train_cli, "--resume=0", "--total_kimg=0.016", "--device=cpu", own)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset_name=custom", "--model_path=people_own_net:raw"], "returned Net; return models.wrap"),
        (["--dataset_name=custom", "--model_path=people_own_net:none"], "has no function 'none'"),
        (["--dataset_name=custom", "--model_path=people_no_net:f"], "cannot import the module 'people_no_net'"),
        (["--dataset_name=digits", "--model_path=people_own_net:raw"], "use it with --dataset_name=custom"),
        (
            ["--dataset_name=custom", "--model_path=people_own_net.py:raw"],
            "write the module, not its file: --model_path=people_own_net:raw$",
        ),
        (["--dataset_name=custom", "--model_path=nets/own.py:raw"], "not its file: --model_path=nets.own:raw$"),
        (
            ["--dataset_name=custom", "--model_path=/elsewhere/own.py:raw"],
            "not its file: --model_path=own:raw, in the folder /elsewhere$",
        ),
        (["--dataset_name=custom"], "needs --model_path, the file of a network or MODULE:FUNCTION"),
    ],
)
def test_mistakes_with_code_of_your_own(here, flags, message):
    with pytest.raises(UserError, match=message):
        call(sample_cli, *flags, "--solver=euler", "--num_steps=3", "--seeds=0", "--device=cpu")


def test_short_runs_keep_the_results_of_each_part(here):
    own = "--model_path=people_own_net:make_net"
    call(train_cli, *TRAIN, own, "--total_kimg=0.004")
    (run,) = here.glob("exps/00000-*")
    first = (run / "predictor-000000.004.safetensors").read_bytes()
    (line,) = (run / "stats.jsonl").read_text().splitlines()
    (shown,) = re.findall(r"loss ([\d.e+-]+) ", (run / "log.txt").read_text().partition("kimg 0.004")[2])
    assert float(shown) == pytest.approx(json.loads(line)["loss"][0] / 16**2, rel=0.01)  # per pixel of 16x16
    call(train_cli, "--resume=0", "--total_kimg=0.012", "--device=cpu", own)
    assert (run / "predictor-000000.004.safetensors").read_bytes() == first
    assert find_predictor(run).name == "predictor-000000.012.safetensors"


def test_missing_prompts_are_noticed_before_a_pipeline_is_loaded(here):
    """The folder has an index but no weights, which nothing gets to miss."""
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"]}
    (here / "sd").mkdir()
    (here / "sd" / "model_index.json").write_text(json.dumps(index))
    network = ["--dataset_name=diffusers", "--model_path=sd", "--device=cpu"]
    with pytest.raises(UserError, match="needs a text: give --prompt=TEXT"):
        call(sample_cli, *network, "--solver=euler", "--num_steps=3")
    with pytest.raises(UserError, match="needs texts: give --prompt_path"):
        call(train_cli, *network)
