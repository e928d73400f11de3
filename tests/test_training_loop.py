"""Distillation against the reference's numbers; micro-batches, continuing, failures."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import ToyNet, common, load_golden

from models import build_denoiser
from models.edm import save_edm_safetensors
from torch_utils.errors import UserError
from torch_utils.files import sha256_of
from torch_utils.seeds import SeededGenerators, stream_seeds
from torch_utils.session import Interrupted
from training import amed_trainer as training_loop
from training import run as run_module
from training.amed_trainer import Distiller, NotFinite, train_predictor
from training.checkpoint import load_predictor
from training.options import AMEDOptions
from training.run import fitting_batch_gpu
from training.run_folder import create_run_folder, find_run, load_newest_state, save_state

TINY = Path(__file__).parent / "golden" / "nets" / "tiny"
TRAIN, TRAIN_JSON = load_golden("train")


def write_tiny(name: str, path: Path) -> Path:
    config = json.loads((TINY / name / "config.json").read_text())["init_kwargs"]
    with np.load(TINY / name / "weights.npz", allow_pickle=False) as arrays:
        weights = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    save_edm_safetensors(build_denoiser("edm", config, weights), path)
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny("edm_song_uncond", tmp_path_factory.mktemp("net") / "tiny.safetensors")


def settings(tiny, outdir, **more) -> dict:
    usual = {"dataset_name": "custom", "model_path": str(tiny), "num_steps": 3, "batch": 2, "seed": 5}
    return {**usual, "total_kimg": 0.002, "outdir": str(outdir), **more}


def stats(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def toy_distiller(case: dict, batch_gpu: int | None) -> Distiller:
    net = ToyNet(discrete=case["schedule_type"] == "discrete")
    names = ("M", "num_steps", "schedule_type", "schedule_rho", "afs", "max_order", "predict_x0", "lower_order_final")
    config = {key: case[key] for key in names if key in case}
    config |= {"sampler_stu": case["stu"], "sampler_tea": case["tea"]}
    bank = case["predictor"]
    config |= {"scale_dir": int(bank[1]) * 0.01, "scale_time": int(bank[2]) * 0.2}
    distiller = Distiller(net, config, batch=4, batch_gpu=batch_gpu, dtype=torch.float64)
    distiller.predictor.load_state_dict({key: common(f"{bank}.{key}") for key in distiller.predictor.state_dict()})
    return distiller


@pytest.mark.parametrize("batch_gpu", [None, 2, 1])
@pytest.mark.parametrize("case", TRAIN_JSON["cases"], ids=lambda c: f"{c['id']}-{c['stu']}")
def test_two_iterations_of_the_reference(case, batch_gpu):
    """Also in micro-batches: the reference took all four samples at once."""
    key = case["id"]
    distiller = toy_distiller(case, batch_gpu)
    size = batch_gpu or 4
    for it, name in enumerate(TRAIN_JSON["latents"]):
        found = distiller.step([(part, {}) for part in common(name).split(size)])
        np.testing.assert_allclose(found[:, 0], TRAIN[f"{key}.loss_scalar"][it], rtol=1e-7)
        for column, which in enumerate(("r", "scale_dir", "scale_time"), 1):
            np.testing.assert_allclose(found[:, column], TRAIN[f"{key}.{which}"][it].mean(axis=1), rtol=1e-7)
    probe = common("w0_probe_idx", torch.int64)
    for name, parameter in distiller.predictor.named_parameters():
        expected, value = f"{key}.end_it1.param.{name}", parameter.detach()
        if expected not in TRAIN.files:
            expected, value = f"{expected}.probe", value.flatten()[probe]
        np.testing.assert_allclose(value, TRAIN[expected], atol=1e-7 * max(1, np.abs(TRAIN[expected]).max()))


def test_the_stream_of_noise_does_not_depend_on_how_it_is_dealt_out(monkeypatch):
    config = {"num_steps": 3}

    def drawn(batch, batch_gpu=None, world=1, rank=0, iteration=0):
        monkeypatch.setattr(training_loop.distributed, "world_size", lambda: world)
        monkeypatch.setattr(training_loop.distributed, "rank", lambda: rank)
        distiller = Distiller(ToyNet(torch.float32), config, batch=batch, batch_gpu=batch_gpu, seed=9)
        distiller.iteration = iteration
        return torch.cat([latents for latents, _ in distiller.draw()])

    whole = drawn(8)
    expected = SeededGenerators(stream_seeds(9, 0, 8)).randn([3, 16, 16])
    assert torch.equal(whole, expected)
    assert torch.equal(drawn(8, batch_gpu=2), whole)
    assert torch.equal(torch.cat([drawn(8, 2, world=2, rank=rank) for rank in range(2)]), whole)
    assert torch.equal(torch.cat([drawn(4, iteration=i) for i in range(2)]), whole)
    assert not torch.equal(drawn(8, iteration=1), whole)


def test_initial_predictor_depends_on_the_seed_alone():
    def weights(seed):
        distiller = Distiller(ToyNet(torch.float32), {"num_steps": 3}, batch=2, seed=seed)
        return torch.cat([value.flatten() for value in distiller.predictor.state_dict().values()])

    torch.manual_seed(1)
    first = weights(3)
    state = torch.get_rng_state()
    assert torch.equal(first, weights(3)) and not torch.equal(first, weights(4))
    assert torch.equal(state, torch.get_rng_state())


def test_a_cache_of_trajectories_asks_the_teacher_once():
    """The first pass is as without a cache; the second has equal samples and no teacher calls."""
    nets = [ToyNet(torch.float32) for _ in range(2)]
    plain, cached = (
        Distiller(net, {"num_steps": 3}, batch=2, teacher_cache=n) for net, n in zip(nets, (None, 4), strict=True)
    )
    for _ in range(2):
        assert torch.equal(plain.iterate(), cached.iterate())
    assert len(nets[0].calls) == len(nets[1].calls) > 0
    assert torch.equal(cached.draw()[0][0], next(iter(cached._cached.values()))[0])  # the stream begins again
    counts = []
    for distiller, net in ((plain, nets[0]), (cached, nets[1])):
        before = len(net.calls)
        distiller.iterate()
        counts.append(len(net.calls) - before)
    assert counts[0] - counts[1] == 8  # Heun, two intervals of two steps
    with pytest.raises(UserError, match="multiple of the batch"):
        Distiller(nets[0], {"num_steps": 3}, batch=2, teacher_cache=3)


def test_a_run_with_a_cache_resumes_bit_for_bit(tiny, tmp_path):
    long = settings(tiny, tmp_path / "long", total_kimg=0.01, teacher_cache=4)
    train_predictor(long, run_dir=tmp_path / "long")
    short = {**long, "total_kimg": 0.006, "outdir": str(tmp_path / "short")}
    train_predictor(short, run_dir=tmp_path / "short")
    train_predictor({**short, "total_kimg": 0.01}, run_dir=tmp_path / "short", resume=True)
    ends = [load_predictor(sorted((tmp_path / name).glob("predictor-*.safetensors"))[-1]) for name in ("long", "short")]
    for one, other in zip(*(end.state_dict().values() for end in ends), strict=True):
        assert torch.equal(one, other)


class Spoilt(ToyNet):
    """Answers NaN below a noise level from some call on."""

    below, ok_calls = 0.5, 0

    def forward(self, x, sigma):
        result = super().forward(x, sigma)
        if len(self.calls) > self.ok_calls and float(self.calls[-1].min()) < self.below:
            return result * float("nan")
        return result


def test_a_loss_that_is_not_finite_changes_nothing():
    net = Spoilt(torch.float32)
    net.ok_calls = 10**9
    distiller = Distiller(net, {"num_steps": 4, "scale_dir": 0.01}, batch=2)
    distiller.step(distiller.draw())
    before = distiller.state()
    net.calls.clear()
    net.ok_calls = 0
    with pytest.raises(NotFinite) as error:
        distiller.step(distiller.draw())
    # Stamps 80, 9.7, 0.47, 0.002: the teacher ends interval 1 with an evaluation at 0.47.
    assert error.value.interval == 1 and error.value.ranks == [0]
    after = distiller.state()
    assert after["iteration"] == before["iteration"] == 1
    for name, value in before["predictor"].items():
        assert torch.equal(after["predictor"][name], value)
    for index, moments in before["optimizer"]["state"].items():
        assert all(torch.equal(moments[key], after["optimizer"]["state"][index][key]) for key in moments)


def test_infinite_gradients_are_replaced():
    distiller = Distiller(ToyNet(torch.float32), {"num_steps": 3}, batch=2)
    parameter = distiller.predictor.fc_r.bias
    parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
    weight = distiller.predictor.fc_r.weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    start = parameter.detach().clone(), weight.detach().clone()
    distiller.step(distiller.draw())
    assert torch.equal(parameter, start[0])  # NaN became 0, so Adam did not move it
    assert torch.equal(weight.grad, torch.full_like(weight, 1e5))
    torch.testing.assert_close(weight.detach(), start[1] - 2 * 5e-3)  # two full Adam steps


@pytest.mark.parametrize("student, teacher", [("amed", "heun"), ("ipndm", "ipndm")])
def test_continuing_is_bit_for_bit(tiny, tmp_path, student, teacher):
    more = {"sampler_stu": student, "sampler_tea": teacher, "scale_time": 0.1, "tick": 0.01, "snap": 1}
    straight = train_predictor(settings(tiny, tmp_path, total_kimg=0.02, **more))
    parts = train_predictor(settings(tiny, tmp_path, total_kimg=0.01, **more))
    assert load_newest_state(parts.parent)["iteration"] == 5
    options = {**load_newest_state(parts.parent)["options"], "total_kimg": 0.02}
    again = train_predictor(options, run_dir=parts.parent, resume=True)
    assert again.parent == parts.parent != straight.parent and again.name == straight.name != parts.name
    one, two = load_predictor(straight), load_predictor(again)
    assert one.config == two.config
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    first, second = (load_newest_state(path.parent) for path in (straight, again))
    assert first["iteration"] == second["iteration"] == 10
    for index, moments in first["optimizer"]["state"].items():
        assert all(torch.equal(moments[key], second["optimizer"]["state"][index][key]) for key in moments)
    timeless = [{k: v for k, v in row.items() if not k.startswith("sec")} for row in stats(straight.parent)]
    assert timeless == [{k: v for k, v in row.items() if not k.startswith("sec")} for row in stats(again.parent)]


def test_what_a_run_leaves(tiny, tmp_path):
    path = train_predictor(settings(tiny, tmp_path, total_kimg=0.012, tick=0.004, batch=2, batch_gpu=1, desc="x"))
    folder = path.parent
    assert folder.name == "00000-custom-3-3-amed-heun-1-polynomial-afs-x"
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "log.txt",
        "predictor-000000.012.safetensors",
        "stats.jsonl",
        "training-state-000000.pt",
        "training_options.json",
    ]
    predictor = load_predictor(path)
    expected = {"num_steps": 3, "img_resolution": 16, "M": 1, "afs": True, "scale_dir": 0.01, "sampler_tea": "heun"}
    assert expected.items() <= predictor.config.items()
    assert predictor.provenance["network"] == "tiny.safetensors" and predictor.provenance["kimg"] == 0.012
    assert predictor.provenance["network_hash"] == sha256_of(tiny) and predictor.provenance["seed"] == 5
    assert predictor.provenance["code_version"] and predictor.provenance["torch"] == torch.__version__
    recorded = json.loads((folder / "training_options.json").read_text())
    assert recorded.pop("provenance")["network_hash"] == sha256_of(tiny)
    assert AMEDOptions.from_dict(recorded).batch_gpu == 1
    rows = stats(folder)
    assert [row["kimg"] for row in rows] == [0.004, 0.008, 0.012]
    assert all(len(row[key]) == 2 for row in rows for key in ("loss", "r", "scale_dir", "scale_time"))
    assert all(0 < value < 1 for row in rows for value in row["r"])
    assert all(abs(value - 1) <= 0.01 for row in rows for value in row["scale_dir"])
    log = (folder / "log.txt").read_text()
    assert f"trained {path} NFE=3 in" in log and log.count("\nkimg ") == 3


def test_the_error_of_an_interval_is_chosen(tiny, tmp_path):
    """The first interval of the first iteration starts from the same state in all runs."""
    found = {}
    for kind in (None, "squared", "absolute"):
        path = train_predictor(settings(tiny, tmp_path, total_kimg=0.001, batch=1, interval_loss=kind))
        found[kind] = stats(path.parent)[0]["loss"][0]
        assert f"loss: {kind or 'squared'} difference" in (path.parent / "log.txt").read_text()
    assert found[None] == found["squared"]
    pixels = 3 * 16**2  # the mean square is at least the squared mean, and equal only for equal values
    assert found["squared"] / pixels > (found["absolute"] / pixels) ** 2 * 1.1 > 0


def test_class_labels_are_drawn_per_sample(tmp_path):
    net = write_tiny("edm_song_cond", tmp_path / "cond.safetensors")
    path = train_predictor(settings(net, tmp_path, total_kimg=0.002, batch=2))
    loaded = run_module.create_model("custom", net)
    distiller = Distiller(loaded, {"num_steps": 3}, batch=6, batch_gpu=3, seed=1)
    labels = torch.cat([cond["class_labels"] for _, cond in distiller.draw()])
    whole = Distiller(loaded, {"num_steps": 3}, batch=6, seed=1).draw()[0][1]["class_labels"]
    assert torch.equal(labels, whole) and (labels.sum(1) == 1).all() and len(labels.unique(dim=0)) > 1
    assert path.is_file()


def test_training_lowers_the_loss(tiny, tmp_path):
    path = train_predictor(settings(tiny, tmp_path, total_kimg=0.06, batch=4, tick=0.02, M=0, sampler_tea="dpm"))
    rows = stats(path.parent)
    assert rows[-1]["loss"][0] < 0.7 * rows[0]["loss"][0]


def test_not_finite_ends_the_run_with_the_last_good_state(tiny, tmp_path, monkeypatch):
    load, calls = run_module.create_model, []

    def spoilt(*arguments, **more):
        net = load(*arguments, **more)

        def hook(module, inputs, output):
            calls.append(inputs[0])
            return output * float("nan") if len(calls) > 22 else output  # 11 calls per iteration

        net.register_forward_hook(hook)
        return net

    monkeypatch.setattr(run_module, "create_model", spoilt)
    with pytest.raises(UserError, match=r"not finite in iteration 3 \(0.004 kimg\), interval 0 \(sigma 80 .*rank 0"):
        train_predictor(settings(tiny, tmp_path, total_kimg=0.02))
    (folder,) = tmp_path.iterdir()
    state = load_newest_state(folder)
    assert state["iteration"] == 2
    assert all(value.isfinite().all() for value in state["predictor"].values())
    assert "not finite" in (folder / "log.txt").read_text()


def test_sigterm_saves_everything(tiny, tmp_path, monkeypatch):
    step, before = Distiller.step, signal.getsignal(signal.SIGTERM)

    def interrupted(self, micro_batches):
        if self.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, micro_batches)

    monkeypatch.setattr(Distiller, "step", interrupted)
    with pytest.raises(Interrupted) as error:
        train_predictor(settings(tiny, tmp_path, total_kimg=0.02))
    assert error.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    (folder,) = tmp_path.iterdir()
    state, predictor = load_newest_state(folder), load_predictor(folder / "predictor-000000.006.safetensors")
    assert state["iteration"] == 3
    assert all(torch.equal(value, state["predictor"][name]) for name, value in predictor.state_dict().items())
    assert f"train.py --resume={folder}" in (folder / "log.txt").read_text()


def _claim(outdir, index, start):
    start.wait()
    for _ in range(5):
        create_run_folder(outdir, lambda number: f"{number:05d}-p{index}")


def test_no_two_runs_get_one_number(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=_claim, args=(tmp_path, index, start)) for index in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert len(names) == 20 and len({name.split("-")[0] for name in names}) == 20


def test_numbers_go_on_after_the_largest(tmp_path):
    (tmp_path / "00007-old").mkdir()
    (tmp_path / ".00008.claim").mkdir()  # of a run that was killed while it chose
    (tmp_path / "notes").mkdir()
    assert create_run_folder(tmp_path, lambda number: f"{number:05d}-new").name == "00009-new"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make a folder"):
        create_run_folder(tmp_path / "file" / "exps", str)


def test_states_two_are_kept_and_damage_is_reported(tmp_path):
    state = {"predictor": {}, "optimizer": {}, "iteration": 1, "options": {}}
    for kimg in (1, 2, 10):
        save_state(tmp_path, kimg, {**state, "iteration": kimg})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training-state-000002.pt", "training-state-000010.pt"]
    assert load_newest_state(tmp_path)["iteration"] == 10
    whole = (tmp_path / "training-state-000010.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense"):
        (tmp_path / "training-state-000010.pt").write_bytes(content)
        with pytest.raises(UserError, match="cannot read .*training-state-000010.pt.*delete it.*000002.pt"):
            load_newest_state(tmp_path)
    torch.save({"something": 1}, tmp_path / "training-state-000010.pt")
    with pytest.raises(UserError, match="not a training state"):
        load_newest_state(tmp_path)


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"predictor": Bad()}, tmp_path / "training-state-000001.pt")
    with pytest.raises(UserError, match="cannot read"):
        load_newest_state(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_find_run(tmp_path):
    for name in ("00000-a", "00001-b", "00002-c", "00004-d", "00004-e"):
        (tmp_path / name).mkdir()
    save_state(tmp_path / "00000-a", 1, {})
    save_state(tmp_path / "00001-b", 1, {})
    assert find_run("True", tmp_path) == tmp_path / "00001-b"  # the newest that has a state
    assert find_run("2", tmp_path) == find_run("00002", tmp_path) == tmp_path / "00002-c"
    assert find_run(str(tmp_path / "00000-a"), "elsewhere") == tmp_path / "00000-a"
    for text, message in (("4", "ambiguous"), ("9", "no such run"), ("nothing", "no such run")):
        with pytest.raises(UserError, match=message):
            find_run(text, tmp_path)
    with pytest.raises(UserError, match="no run in"):
        find_run("true", tmp_path / "00002-c")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sampler_stu": "heun"}, "cannot learn"),
        ({"sampler_tea": "amed"}, "cannot be the teacher"),
        ({"sampler_stu": "nothing"}, "unknown solver"),
        ({"num_steps": 1}, "at least 2"),
        ({"M": -1}, "M=-1"),
        ({"M": 0.5}, "M=0.5"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 4, "batch_gpu": 3}, "batch_gpu=3 must divide"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"total_kimg": 0}, "total_kimg=0"),
        ({"afs": "perhaps"}, "afs='perhaps'"),
        ({"afs": "data"}, "mean and standard deviation"),
        ({"sampler_stu": "dpmpp", "max_order": 4}, "max_order=4"),
        ({"scale_dir": 1.0}, "scale_dir=1.0"),
        ({"sigma_min": 90.0}, "sigma_min < sigma_max"),
        ({"sigmas": [1.0, 2.0]}, "strictly decreasing"),
        ({"schedule_type": "cosine"}, "schedule_type=cosine: choose from"),
        ({"schedule_type": "discrete"}, "noise table"),
        ({"dataset_name": "nothing"}, "unknown"),
        ({"model_path": "/nowhere/net.pkl"}, "is not a file"),
        ({"guidance_type": "cfg"}, "guidance_type 'cfg'"),
        ({"guidance_rate": 2.0}, "guidance_rate 2"),
        ({"amp": "fp8"}, "amp=fp8"),
        ({"color": 1}, "unknown training option 'color'"),
    ],
)
def test_impossible_settings_leave_no_folder(tiny, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train_predictor(settings(tiny, tmp_path / "exps", **change))
    assert not (tmp_path / "exps").exists()


def test_share_of_every_process():
    options = AMEDOptions("digits", batch=10)
    options.check(5)
    with pytest.raises(UserError, match=r"batch=10 must be divisible by the number of processes \(4\)"):
        options.check(4)


def test_a_run_is_continued_only_where_it_can_be(tiny, tmp_path):
    path = train_predictor(settings(tiny, tmp_path, total_kimg=0.004))
    options = load_newest_state(path.parent)["options"]
    with pytest.raises(UserError, match="has reached 0.004 kimg: to continue, pass a larger --total_kimg"):
        train_predictor(options, run_dir=path.parent, resume=True)
    other = tmp_path / "other.safetensors"
    net = run_module.create_model("custom", tiny)
    with torch.no_grad():
        next(net.parameters()).mul_(1.1)
    save_edm_safetensors(net, other)
    with pytest.raises(UserError, match="is not the network that"):
        train_predictor({**options, "total_kimg": 1, "model_path": str(other)}, run_dir=path.parent, resume=True)
    with pytest.raises(UserError, match="already holds a run"):
        train_predictor(options, run_dir=path.parent)


@pytest.mark.parametrize(("most", "found"), [(12, 12), (11, 6), (5, 4), (1, 1)])
def test_micro_batches_divide_the_share(most, found, capsys):
    """Of 12 samples, where ``most`` fit into memory at once."""

    def probe_memory(batch_gpu):
        if batch_gpu > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert fitting_batch_gpu(probe_memory, 12, "cpu") == found
    with pytest.raises(UserError, match="even with --batch-gpu=1"):
        fitting_batch_gpu(lambda batch_gpu: probe_memory(99), 12, "cpu")
