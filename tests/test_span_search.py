"""Settings of a span solver that a run finds itself: time, choices, the plain solver, resuming.

Time is counted in network calls here (``ticking``), so that nothing depends on the machine.
"""

import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_train_cli import invoke
from toy import ToyNet
from two_processes import on_two

from solvers import sample
from torch_utils import distributed
from torch_utils.errors import UserError
from torch_utils.safe_pickle import safe_load
from torch_utils.seeds import SeededGenerators
from training import run as run_module
from training import span_search
from training import trainer as trainer_module
from training.checkpoint import load_predictor
from training.flags import OBJECTIVES, flags_of, new_options
from training.options import CHOSEN, SpanOptions, Start
from training.run_folder import load_newest_state, stored_options
from training.sample_loss import DenoiserFeatures, SampleScore, feature_distance
from training.span_run import _pairs, train_span
from training.span_search import Candidate, Costs, Plan, Search, make_plan, trial_units
from training.span_trainer import SpanTrainer

PER_IMAGE = 0.001  # seconds of a network call without gradient
WITH_GRADIENT = 2.5  # times as long with one


class Net(ToyNet):
    """The mixture of Gaussians; every call moves the clock of ``ticking``."""

    weights_hash, source_path, evals_per_call, seconds = "toy", "toy.safetensors", 1, 0.0
    sigma_inv = property()  # it has no table of noise levels

    def __init__(self):
        super().__init__(torch.float32)

    def forward(self, x, sigma):
        self.calls.clear()
        Net.seconds += len(x) * PER_IMAGE * (WITH_GRADIENT if torch.is_grad_enabled() else 1)
        return super().forward(x, sigma)


def tick(patch, factor=1.0) -> None:
    """Replaces the clock of training by that of ``Net``, times a factor, and the network by one."""
    patch.setattr(Net, "seconds", 0.0)
    clock = SimpleNamespace(monotonic=lambda: factor * Net.seconds)
    for module in (span_search, trainer_module, run_module):
        patch.setattr(module, "time", clock)
    patch.setattr(run_module, "create_model", lambda *_, **__: Net())


@pytest.fixture(autouse=True)
def ticking(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tick(monkeypatch)
    yield
    torch.set_num_threads(threads)


def options(outdir="exps", **more) -> SpanOptions:
    """Those of the command line; ``more``: the flags of the user."""
    given = {"dataset_name": "custom", "sampler_stu": "span", "num_steps": 5, "num_steps_tea": 11, "seed": 3}
    given |= {"minutes": 0.1, "outdir": str(outdir), **more}
    if "sigmas" in given:
        del given["num_steps"]
    known = {"objective"}.union(*(flags_of(kind) for kind in OBJECTIVES.values()))
    return new_options(dict.fromkeys(known) | given, set(given))


# The plan

COSTS = Costs(0.001, {8: 0.06, 16: 0.11, 32: 0.2})
TIMES = dict(calls=3, teacher_calls=30, starts=48, size=12288)


def plan_for(minutes, costs=COSTS, **more) -> Plan:
    return make_plan(60 * minutes, costs, options(minutes=minutes, **more), **TIMES)


def test_a_plan_uses_its_time_and_more_time_gives_more_of_everything():
    plans = [plan_for(minutes) for minutes in (0.3, 1, 3, 10, 60)]
    for minutes, plan in zip((0.3, 1, 3, 10, 60), plans, strict=True):
        assert 0.9 * 60 * minutes < sum(plan.seconds.values()) <= 60 * minutes
        assert plan.seconds["teacher pairs"] == pytest.approx(0.03 * (plan.pairs + plan.val_pairs))
        assert 8 <= plan.val_pairs <= plan.pairs and plan.screened <= plan.val_pairs
    for name in ("batch", "pairs", "val_pairs", "starts", "screened", "best", "candidates", "iterations"):
        values = [getattr(plan, name) for plan in plans]
        assert values == sorted(values) or name == "iterations", name
    assert (plans[0].candidates, plans[-1].candidates) == (3, 8) and plans[0].seconds["training"] > 0.2 * 18
    assert plans[0].batch == 8 and plans[-1].batch == 32 and plans[-1].pairs == 4096


def test_a_plan_keeps_what_is_given():
    plan = plan_for(1, Costs(0.001, {16: 0.11}), pairs=100, val_pairs=20, batch=16, val_every=7)
    assert (plan.pairs, plan.val_pairs, plan.batch, plan.val_every) == (100, 20, 16, 7)


@pytest.mark.parametrize("costs", [COSTS, Costs(2.0, {8: 90.0}), Costs(1e-5, {8: 1e-3})], ids=["cpu", "slow", "fast"])
@pytest.mark.parametrize("more", [{}, {"pairs": 500, "val_pairs": 50}])
def test_too_short_a_time_is_refused_with_one_that_is_enough(costs, more):
    with pytest.raises(UserError, match="is too short: a teacher pair takes") as refusal:
        plan_for(1e-4, costs, **more)
    needed = float(str(refusal.value).split()[-4])
    assert plan_for(needed, costs, **more).iterations >= 10
    with pytest.raises(UserError, match="is too short"):
        plan_for(0.6 * needed, costs, **more)


@pytest.mark.parametrize("count", span_search.CANDIDATES)
def test_trials_take_the_planned_time(count, monkeypatch):
    """The planned units against the rounds themselves, with candidates that only count."""
    spent, validations = 0.0, 0

    def attempt(one, pairs, length):
        nonlocal spent, validations
        spent, validations = spent + length - one.seconds, validations + 1
        one.seconds, one.value = length, one.quality
        one.values.append(one.value)

    search = Search.__new__(Search)
    search.plan, search.round, search.finished = replace(plan_for(1), trial=1.0, candidates=count), 0, []
    search.contenders = [Candidate(None, None) for _ in range(count)]
    for place, one in enumerate(search.contenders):
        one.quality, one.axis = (place * 5 % 7, "start" if place else "")
    extra = Candidate(None, None, axis=None)
    extra.quality = 9
    monkeypatch.setattr(search, "_try", attempt)
    monkeypatch.setattr(search, "_together", lambda: [extra])
    search.trials(None, lambda: None)
    assert (spent, validations) == trial_units(count)
    assert [one.quality for one in search.contenders] == [0]


# A run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(folder of a run, file, seconds): killed in the second round of trials, then continued.

    seconds: without those since the last saved state, which the kill has cost.
    """
    folder, attempt, count = tmp_path_factory.mktemp("auto"), Search._try, 0

    def interrupted(self, one, pairs, length):
        nonlocal count
        count += self.round > 0
        if count == 2:
            raise KeyboardInterrupt
        return attempt(self, one, pairs, length)

    with pytest.MonkeyPatch.context() as patch:
        tick(patch)
        with patch.context() as inner, pytest.raises(KeyboardInterrupt):
            inner.setattr(Search, "_try", interrupted)
            train_span(options(folder, minutes=0.4))
        (run,) = folder.glob("0*")
        lost = Net.seconds - safe_load(run / "search-state.pt")["elapsed"]
        assert 0 < lost < 3
        for finished in ("screen", "make_plan"):
            patch.setattr(Search, finished, None)
        path = train_span(stored_options(run), run_dir=run, resume=True)
        return run, path, Net.seconds - lost


def test_a_killed_search_says_how_to_continue(done):
    assert f"Interrupted; continue with: python train.py --resume={done[0]}" in (done[0] / "log.txt").read_text()


def test_the_run_ends_in_time_and_says_what_it_chose_and_why(done):
    folder, path, seconds = done
    assert 0.9 * 24 < seconds <= 24
    log = (folder / "log.txt").read_text()
    assert "plan for 0.4 minutes: " in log and f"sample.py --predictor_path={folder}" in log
    student = load_predictor(path)
    record, validation = student.provenance["search"], student.provenance["validation"]
    assert f"chosen: {record['why']}" in log and "score" in record["why"]
    plain = record["plain"]
    assert validation["best"] < 0.5 * validation["plain"] and validation["plain"] == min(plain.values())
    assert validation["saved"] == "trained" and len(plain) >= 4
    assert record["minutes"] == 0.4 and record["left_open"] == sorted(CHOSEN)
    axes = ("start", "rates", "heads", "loss")
    assert record["chosen"] == {axis: record["trials"][0][axis] for axis in axes}
    longest = [trial for trial in record["trials"] if len(trial["scores"]) == len(record["trials"][0]["scores"])]
    assert min(trial["scores"][-1] for trial in longest) == record["trials"][0]["scores"][-1]
    assert len({tuple(trial[axis] for axis in axes) for trial in record["trials"]}) == len(record["trials"]) > 2
    stored = json.loads((folder / "training_options.json").read_text())
    assert stored["provenance"]["search"] == record and stored["loss"] == record["chosen"]["loss"]
    assert stored["init"] == record["chosen"]["start"].split(",")[0]
    assert (
        ",".join(student.config["heads"]) == record["chosen"]["heads"].replace("none", "")
        and stored["pairs"] == record["plan"]["pairs"]
    )


def test_the_score_in_the_record_is_that_of_the_file(done):
    """Measured again, with the samples of the record's pairs, by the formula."""
    folder, path, _ = done
    student, net = load_predictor(path), Net()
    state = load_newest_state(folder)
    chosen = SpanOptions.from_dict(state["options"])
    pairs = _pairs(net, chosen, (0.002, 80.0), None, "cpu")
    latents, cond, target = pairs.batch(pairs.validation)
    with torch.no_grad():
        x, features = student.run(net, latents), DenoiserFeatures(net, 0.5)
        rms = (x - target).square().mean(dim=(1, 2, 3)).sqrt()
        apart = feature_distance(features(x), features(target)).sqrt()
    assert float((rms * apart).sqrt().mean()) == pytest.approx(state["best"]["value"], rel=1e-4)
    assert state["best"]["value"] == student.provenance["validation"]["best"]


def test_a_finished_run_can_be_trained_for_longer(done):
    folder, path, _ = done
    state = load_newest_state(folder)
    longer = state["options"] | {"total_kimg": state["options"]["total_kimg"] + 0.04, "minutes": None}
    again = train_span(longer, run_dir=folder, resume=True)
    facts = load_predictor(again).provenance
    assert again != path and facts["search"] == load_predictor(path).provenance["search"]
    assert facts["validation"]["plain"] == load_predictor(path).provenance["validation"]["plain"]


@pytest.mark.parametrize("how", ["upwards", "nan"])
def test_what_training_does_not_improve_is_the_plain_solver(tmp_path, monkeypatch, capsys, how):
    """Every step goes up the gradient, or fails: the file holds the best plain solver."""
    accumulate = SpanTrainer._accumulate

    def spoilt(self, trained):
        found = accumulate(self, trained)
        for parameters in self.groups.values():
            for parameter in parameters:
                parameter.grad = None if parameter.grad is None else -parameter.grad
        return found if how == "upwards" else (math.nan, math.nan)

    monkeypatch.setattr(SpanTrainer, "_accumulate", spoilt)
    path = train_span(options(tmp_path, afs=True))
    assert "training has not beaten it, so the file holds this plain solver, as a table" in capsys.readouterr().out
    student = load_predictor(path)
    validation, plain = student.provenance["validation"], student.provenance["search"]["plain"]
    assert validation["saved"] == min(plain, key=plain.get) and not student.config["heads"]
    solver, grid = validation["saved"].split("@")
    (solver, order), (kind, _, rho) = solver.split(":"), grid.partition(":")
    latents = SeededGenerators(range(4)).randn([3, 16, 16])
    own = {"thresholding": False} if solver in ("dpmpp", "unipc") else {}
    named = {"solver": {"ab": "ipndm_v"}.get(solver, solver), "max_order": int(order), **own}
    named |= {"schedule_type": kind, "schedule_rho": float(rho or 7), "num_steps": 5, "afs": True}
    expected, info = sample(Net(), latents, **named, return_info=True)
    torch.testing.assert_close(sample(Net(), latents, solver="span", predictor=student), expected, atol=1e-4, rtol=1e-4)
    assert student.evaluations() == info.nfe == 3


def test_flags_of_the_user_are_kept(tmp_path):
    fixed = {"heads": "none", "loss": "huber", "lrs": "knots=0.01", "init": "dpmpp:2@logsnr", "batch": 8, "pairs": 30}
    path = train_span(options(tmp_path, **fixed, val_pairs=9, afs=False, num_steps=4))
    student = load_predictor(path)
    record = student.provenance["search"]
    assert {trial["heads"] for trial in record["trials"]} == {"none"}
    assert {trial["loss"] for trial in record["trials"]} == {"huber"}
    assert {trial["rates"] for trial in record["trials"]} == {"x1"}
    assert {trial["start"].split(",")[0] for trial in record["trials"]} == {"dpmpp:2@logsnr"}
    assert record["plan"] | {"batch": 8, "pairs": 30, "val_pairs": 9} == record["plan"]
    assert student.config["first_step"] == "none" and student.evaluations() == 3
    assert student.config["max_order"] == 2 and all("no analytical step" in name for name in record["plain"])


@pytest.mark.parametrize(
    "more", [{"preset": "gs"}, {"sigmas": [80.0, 20.0, 1.0, 0.002]}, {"w_dist": 0.1}, {"parallel": 2}], ids=str
)
def test_presets_and_parts_of_the_loss(tmp_path, more):
    start = options(tmp_path, minutes=0.06, **more)
    student = load_predictor(train_span(start))
    assert student.evaluations() == start.calls
    assert student.provenance["validation"]["best"] <= student.provenance["validation"]["first"]
    if "sigmas" in more:
        assert set(student.provenance["search"]["chosen"]["start"].split("@")[1:]) == {"given"}


def test_processes_agree_although_their_clocks_differ(tmp_path, monkeypatch):
    def work(rank):
        tick(monkeypatch, 1 + 0.7 * rank)
        path = train_span(options(tmp_path, minutes=0.05))
        state = load_newest_state(path.parent)
        everyone = distributed.gather_objects((state["options"], state["best"]["value"], state["iteration"]))
        assert everyone[0] == everyone[1]

    assert on_two(work)[0] == {0: "fine", 1: "fine"}
    assert len(list(tmp_path.glob("0*"))) == 1


# Parts


def test_rates_are_full_until_they_decay(tmp_path):
    trainer = SpanTrainer.__new__(SpanTrainer)
    trainer.options, trainer.total, trainer.hold = SpanOptions("custom", warmup=4, lr_final=0.1), 30, 10
    rates = []
    for trainer.iteration in range(31):
        rates.append(trainer._rate())
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and rates[3:11] == [1.0] * 8
    assert rates[20] == pytest.approx(0.1 + 0.9 * 0.5) and rates[30] == pytest.approx(0.1)


def test_a_factor_of_all_rates():
    usual, twice = SpanOptions("custom", heads="none"), SpanOptions("custom", heads="none", lr_factor=2.0)
    student = usual.make_student(0.002, 80.0)
    assert twice.rates(student) == {name: 2 * rate for name, rate in usual.rates(student).items()}


def test_orders_of_starts():
    starts = SpanOptions("custom", init="ipndm:4@polynomial:5,ab:2,@logsnr,dpmpp").starts()
    assert starts[:2] == [Start("ipndm", 4, "polynomial:5"), Start("ab", 2, None)]
    assert [start.init for start in starts] == ["ipndm:4@polynomial:5", "ab:2", "@logsnr", "dpmpp"]


def test_a_score_does_not_prefer_pixels_or_features():
    """A factor of one distance changes all scores alike."""
    net, generator = Net(), torch.Generator().manual_seed(0)
    x, other, target = torch.randn(3, 4, 3, 16, 16, generator=generator).unbind()
    score = SampleScore(net, True)
    ratio = score(x, target, {}) / score(target + 2 * (other - target), target, {})
    assert ratio.shape == (4,) and bool((score(target, target, {}) < 1e-3).all())
    pixels = SampleScore(net, False)
    torch.testing.assert_close(pixels(x, target, {}), (x - target).square().mean(dim=(1, 2, 3)).sqrt())
    assert math.isfinite(float(ratio.sum()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sampler_stu=span", "--minutes=0"], "'--minutes'"),
        (["--sampler_stu=span", "--minutes=-1"], "'--minutes'"),
        (["--sampler_stu=span", "--minutes=1", "--total_kimg=1"], "leave --total_kimg out"),
        (["--sampler_stu=amed", "--minutes=1"], "use --sampler_stu=span, or leave --minutes out"),
        (["--objective=sfd", "--minutes=1"], "use --sampler_stu=span, or leave --minutes out"),
        (["--minutes=1"], "use --sampler_stu=span, or leave --minutes out"),
    ],
)
def test_mistakes_get_one_line(arguments, message, tmp_path):
    done = invoke("--dataset_name=digits", *arguments, f"--outdir={tmp_path / 'exps'}")
    assert done.exit_code == 2 and message in done.output.strip().splitlines()[-1], done.output
    assert not (tmp_path / "exps").exists() and os.listdir(tmp_path) == []
