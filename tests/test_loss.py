"""Distillation: start of each interval, teacher, gradients, and that training helps."""

import pytest
import torch
from toy import ToyNet, common

from solvers import SOLVERS, get_schedule, sample
from training.loss import DistillationLoss, make_solvers
from training.predictor import DEFAULTS, AMEDPredictor

torch.set_num_threads(1)
STUDENTS = [name for name, solver in SOLVERS.items() if solver.can_learn]
TEACHERS = [name for name, solver in SOLVERS.items() if solver.can_teach]
ONE_STEP = {"euler", "dpm", "amed"}  # their step depends on the current point alone
BASE = {"num_steps": 4, "sampler_tea": "heun", "M": 1, "scale_dir": 0.05, "scale_time": 0.2}


def setup(**config):
    config = {**BASE, **config}
    net = ToyNet()
    torch.manual_seed(0)
    predictor = AMEDPredictor(**config).double()
    loss = DistillationLoss(net, predictor.config)
    x = common("latents3") * loss.sigma_max
    targets = loss.teacher_trajectory(x)
    return net, predictor, loss, x, targets


def walk(loss, predictor, x, targets):
    """The starting points and errors of all intervals."""
    starts, errors = [x], []
    for k in range(len(targets)):
        error, x = loss.student_step(predictor, x, k, targets[k])
        starts.append(x)
        errors.append(error)
    return starts, errors


@pytest.mark.parametrize(
    ("student", "order", "teacher", "highest"), [("ipndm", 4, "dpmpp", 3), ("deis", 4, "unipc", 3)]
)
def test_a_teacher_without_so_high_an_order_takes_its_highest(student, order, teacher, highest):
    rules = make_solvers({**DEFAULTS, "sampler_stu": student, "sampler_tea": teacher, "max_order": order})
    assert [solver.max_order for solver in rules] == [order, highest]
    rules = make_solvers({**DEFAULTS, "sampler_stu": student, "sampler_tea": teacher, "max_order": 2})
    assert [solver.max_order for solver in rules] == [2, 2]


@pytest.mark.parametrize("student", STUDENTS)
def test_where_intervals_start(student):
    _, predictor, loss, x, targets = setup(sampler_stu=student)
    starts, errors = walk(loss, predictor, x, targets)
    assert not any(start.requires_grad for start in starts)
    assert all(error.requires_grad and error.shape == x.shape for error in errors)
    if student in ONE_STEP:
        for k, target in enumerate(targets):
            assert torch.equal(starts[k + 1], target)
        # Restarting is history-free: any interval may be asked for alone.
        again, _ = loss.student_step(predictor, targets[0], 1, targets[1])
        torch.testing.assert_close(again, errors[1], rtol=0, atol=0)
    else:
        for k, target in enumerate(targets):
            assert not torch.allclose(starts[k + 1], target)
            torch.testing.assert_close((starts[k + 1] - target) ** 2, errors[k].detach(), rtol=0, atol=0)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("student", sorted(set(STUDENTS) - ONE_STEP))
def test_multistep_students_train_on_the_path_that_is_sampled(student, afs):
    """Student points and history across intervals give exactly the trajectory of ``sample``."""
    _, predictor, loss, x, targets = setup(sampler_stu=student, afs=afs)
    for _ in range(2):  # the second time must not remember the first
        starts, _ = walk(loss, predictor, x, targets)
        expected = sample(
            ToyNet(),
            common("latents3"),
            solver=student,
            num_steps=4,
            afs=afs,
            predictor=predictor,
            max_order=3,
            return_trajectory=True,
        )
        torch.testing.assert_close(torch.stack(starts), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_teacher_is_the_plain_solver_on_more_points(teacher, extra):
    config = {"sampler_tea": teacher, "M": extra, "schedule_type": "polynomial", "schedule_rho": 5}
    net, _, loss, x, targets = setup(**config)
    sigmas = get_schedule(3 * (extra + 1) + 1, 0.002, 80, "polynomial", 5)
    torch.testing.assert_close(loss.sigmas, sigmas[:: extra + 1], rtol=1e-13, atol=0)
    assert len(net.calls) == 3 * (extra + 1) * SOLVERS[teacher].stages
    expected = sample(ToyNet(), common("latents3"), solver=teacher, sigmas=sigmas, max_order=3, return_trajectory=True)
    torch.testing.assert_close(targets, expected[extra + 1 :: extra + 1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("make", [list, torch.tensor])
def test_explicit_sigmas_are_refined_evenly_in_ln_sigma(make):
    values = [31.7, 4.0, 0.3, 0.0123]
    given = values if make is list else torch.tensor(values, dtype=torch.float64)
    net, _, loss, x, targets = setup(sampler_tea="euler", M=2, sigmas=given)
    assert loss.sigmas.tolist() == values
    assert loss.sigma_max == 31.7
    sigma_cond = torch.stack([c[0] for c in net.calls])
    assert len(sigma_cond) == 9
    assert sigma_cond[::3].tolist() == values[:-1]  # to the last bit
    assert loss.teacher_sigmas[::3].tolist() == values
    ratios = loss.teacher_sigmas.log().diff().reshape(3, 3)
    torch.testing.assert_close(ratios, ratios[:, :1].expand(3, 3), rtol=1e-12, atol=0)
    expected = sample(ToyNet(), common("latents3"), solver="euler", sigmas=loss.teacher_sigmas, return_trajectory=True)
    assert torch.equal(targets, expected[3::3])


def test_teacher_never_uses_afs():
    net, *_, with_afs = setup(afs=True)
    calls = len(net.calls)
    net, *_, without = setup(afs=False)
    assert calls == len(net.calls) == 12
    assert torch.equal(with_afs, without)


@pytest.mark.parametrize("student", STUDENTS)
def test_gradients_under_afs(student):
    """In interval 0 the predictor sees zeros: their weight gets no gradient, the bias does."""
    _, predictor, loss, x, targets = setup(sampler_stu=student, afs=True)
    torch.nn.init.constant_(predictor.enc_layer0.bias, 0.1)  # zero bias and zero input would stop all of the encoder
    for k in range(3):
        predictor.zero_grad()
        error, x = loss.student_step(predictor, x, k, targets[k])
        error.sum().backward()
        gradients = {name: float(p.grad.abs().max()) for name, p in predictor.named_parameters()}
        assert (gradients.pop("enc_layer0.weight") == 0) == (k == 0)
        assert all(value > 0 for value in gradients.values()), gradients


@pytest.mark.parametrize("student", ["amed", "ipndm", "dpmpp"])
def test_gradient_equals_finite_differences(student):
    """The gradient stays in its interval: the start and the history are constants."""
    _, predictor, loss, x, targets = setup(sampler_stu=student)
    _, middle = loss.student_step(predictor, x, 0, targets[0])
    held = loss._state
    loss.student_step(predictor, middle, 1, targets[1])[0].sum().backward()
    for parameter in (predictor.fc_r.bias, predictor.fc_scale_dir.bias, predictor.fc_scale_time.bias):
        values = []
        for shift in (1e-5, -1e-5):
            with torch.no_grad():
                parameter += shift
                loss._state = held
                values.append(float(loss.student_step(predictor, middle, 1, targets[1])[0].sum()))
                parameter -= shift
        assert float(parameter.grad) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("student", ["amed", "ipndm"])
def test_training_lowers_the_loss(student):
    _, predictor, loss, x, targets = setup(sampler_stu=student)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=5e-3)

    def total():
        with torch.no_grad():
            return float(sum(error.sum() for error in walk(loss, predictor, x, targets)[1]))

    before = total()
    for _ in range(12):
        current = x
        for k in range(3):
            optimizer.zero_grad()
            error, current = loss.student_step(predictor, current, k, targets[k])
            error.sum().div(len(x)).backward()
            optimizer.step()
    assert total() < 0.7 * before


def test_what_was_predicted_is_reported():
    _, predictor, loss, x, targets = setup()
    loss.student_step(predictor, x, 0, targets[0])
    r, scale_dir, scale_time = loss.predicted
    assert r.shape == scale_dir.shape == scale_time.shape == (3, 1, 1, 1)
    assert not r.requires_grad
    assert ((scale_time - 1).abs() <= 0.2).all() and ((scale_dir - 1).abs() <= 0.05).all()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"M": -1}, "M=-1"),
        ({"M": 1.5}, "M=1.5"),
        ({"sampler_stu": "heun"}, "sampler_stu=heun cannot learn"),
        ({"sampler_tea": "amed"}, "'amed' cannot be the teacher"),
        ({"sampler_tea": "rk45"}, "unknown solver 'rk45'"),
        ({"num_steps": 1}, "at least 2"),
        ({"schedule_type": "cosine"}, "unknown schedule_type"),
        ({"sigmas": [1.0, 2.0]}, "decreasing"),
        ({"max_order": 7, "sampler_stu": "ipndm"}, "max_order=7"),
    ],
)
def test_mistakes_are_explained(config, text):
    with pytest.raises(ValueError, match=text):
        DistillationLoss(ToyNet(), {**BASE, **config})


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("teacher", ["heun", "ipndm", "dpmpp", "unipc"])
@pytest.mark.parametrize("student", ["amed", "euler", "ipndm"])
def test_what_the_teacher_evaluated_is_not_asked_again(student, teacher, afs):
    """The same errors and gradients; one call less where the teacher evaluated the start."""
    net, predictor, loss, x, _ = setup(sampler_stu=student, sampler_tea=teacher, afs=afs)
    taught = loss.run_teacher(x)
    torch.testing.assert_close(taught.targets, loss.teacher_trajectory(x), rtol=0, atol=0)
    intervals = range(3) if student in ONE_STEP else range(1)
    if teacher == "unipc":  # it evaluates before it corrects: only the starting point is a state of its trajectory
        intervals = range(1)
    assert set(taught.cached_evals) == {k for k in intervals if k or not afs}
    start, found = x, []
    for k, target in enumerate(taught.targets):
        runs = []
        for known in (None, taught.cached_evals.get(k)):
            state = loss._state
            predictor.zero_grad()
            before = len(net.calls)
            error, after = loss.student_step(predictor, start, k, target, None, known)
            error.sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in predictor.parameters() if p.grad is not None])
            runs.append((error.detach(), gradient, after, len(net.calls) - before))
            loss._state, last = state, loss._state
        loss._state = last
        for plain, shared in zip(*(run[:3] for run in runs), strict=True):
            torch.testing.assert_close(shared, plain, rtol=1e-7, atol=1e-9)
        found.append(runs[0][3] - runs[1][3])
        start = after
    assert found == [int(k in taught.cached_evals) for k in range(3)]


def test_checkpointing_leaves_the_gradients_alone_and_keeps_less():
    """Recomputed activations: gradients equal to the bit, and fewer bytes for the backward pass."""
    kept, gradients = [], []
    for checkpointing in (False, True):
        _, predictor, loss, x, targets = setup(sampler_stu="amed")
        loss.checkpointing = checkpointing
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            error, _ = loss.student_step(predictor, x, 0, targets[0])
        error.sum().backward()
        kept.append(sum(sizes))
        gradients.append(torch.cat([p.grad.flatten() for p in predictor.parameters() if p.grad is not None]))
    assert torch.equal(*gradients) and kept[1] < 0.7 * kept[0]
