"""The comparison of learned solvers: records, what one table may hold, intervals."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from toy import ToyNet, common

from benchmarks import learned_solvers, report_learned_solvers
from evaluation.frechet import frechet_distance
from solvers.span_table import SpanSolver
from torch_utils.errors import UserError
from training.options import SpanOptions


@pytest.fixture
def rows_at(tmp_path, monkeypatch):
    """The file of rows, empty, that both modules use."""
    file = tmp_path / "rows.jsonl"
    file.touch()
    monkeypatch.setattr(report_learned_solvers, "rows_file", lambda network: file)
    return file


def recorder(tmp_path, file):
    """A ``LearnedSolvers`` that can record rows but has no network."""
    own = learned_solvers.LearnedSolvers.__new__(learned_solvers.LearnedSolvers)
    own.images, own.dataset_name, own.work, own.file = 1000, "digits", tmp_path / "work", file
    own.bench = SimpleNamespace(net=SimpleNamespace(weights_hash="0" * 64))
    return own


def row_of(method="full", nfe=3, seed=0, value=2.0, groups=True, part="main"):
    scores = {name: value for name in ("fid", "fid2", "distance", "precision", "recall")}
    if groups:
        scores |= {
            f"{name}_left_out": [value + 0.01 * math.sin(g) for g in range(20)]
            for name in report_learned_solvers.SCORES
        }
    own = {"part": part, "method": method, "nfe": nfe, "nfe_spent": nfe, "seed": seed, "date": "2026-11-28"}
    return {**own, "images": 1000, "current": groups, **scores}


# ---- evaluations ---------------------------------------------------------------------------------


def test_a_row_that_spent_other_evaluations_is_not_recorded(tmp_path, rows_at):
    own, key = recorder(tmp_path, rows_at), {"part": "main", "method": "full", "nfe": 3, "seed": 0}
    with pytest.raises(UserError, match="full, seed 0 states 3 evaluations but spent 4"):
        own.once(key, lambda: {"nfe_spent": 4, "fid": 1.0, "fid_left_out": []})
    assert rows_at.read_text() == ""
    own.once(key, lambda: {"nfe_spent": 3, "images": 1000, "fid": 1.0, "fid_left_out": []})
    assert json.loads(rows_at.read_text())["nfe_spent"] == 3


def test_a_row_that_spent_other_evaluations_is_not_reported(rows_at):
    rows_at.write_text(json.dumps(row_of() | {"nfe_spent": 4}) + "\n")
    with pytest.raises(UserError, match="spent 4"):
        report_learned_solvers.read("digits")


def settings_of_every_row():
    for nfe in (3, 4, 5, 6, 8):
        for preset in learned_solvers.STEPS:
            yield nfe, preset, learned_solvers.span_flags("digits", nfe, preset)
        for name, changes in learned_solvers.ABLATIONS.items():
            yield nfe, name, learned_solvers.span_flags("digits", nfe, "full", changes)


def test_every_row_spends_the_evaluations_of_its_column():
    spent = [
        (name, nfe, SpanOptions(**settings).make_student(0.002, 80.0).evaluations())
        for nfe, name, settings in settings_of_every_row()
        if settings is not None
    ]
    assert [case for case in spent if case[1] != case[2]] == []
    assert {nfe for name, nfe, _ in spent if name == "two calls in one batch"} == {4, 6, 8}
    assert {nfe for name, nfe, _ in spent if name == "epd"} == {3, 5, 6, 8}


def test_calls_in_one_batch_count_as_one_call_in_a_row():
    """EPD's authors count two parallel calls as one: two calls per interval, three here."""
    student = SpanSolver.preset("epd", num_steps=4)
    found = learned_solvers.budget({"pairs": 384, "val_pairs": 64}, student)
    assert (student.evaluations(), found["calls"], found["pairs"]) == (8, 5, 448)
    assert found["parameters"] == 6 + 6 + 3 + 3  # places, times, scales, one weight per interval
    assert (
        learned_solvers.budget({}, SpanSolver.preset("full", num_steps=5, learn=["knots", "sigma_scale"]))["parameters"]
        == 6
    )


# ---- measuring again -----------------------------------------------------------------------------


def test_an_earlier_row_is_measured_again_and_a_current_one_is_not(tmp_path, rows_at):
    own, key = recorder(tmp_path, rows_at), {"part": "main", "method": "AMED-Solver", "nfe": 3, "seed": 0}
    earlier = row_of("AMED-Solver", groups=False) | {"network": "0" * 16, "command": "python train.py"}
    rows_at.write_text(json.dumps(earlier) + "\n")
    for _ in range(2):
        own.once(key, lambda: row_of("AMED-Solver", value=3.0))
    values = [json.loads(line)["fid"] for line in rows_at.read_text().splitlines()]
    assert values == [2.0, 3.0]
    assert (
        report_learned_solvers.collect(report_learned_solvers.read("digits"), "main")["AMED-Solver", 3][0]["fid"] == 3.0
    )
    own.images = 5000  # and once more on more images
    own.once(key, lambda: row_of("AMED-Solver", value=2.5) | {"images": 5000})
    rows = report_learned_solvers.read("digits")
    assert [row["current"] for row in rows] == [False, False, True]
    assert [row["fid"] for row in report_learned_solvers.collect(rows, "main")["AMED-Solver", 3]] == [2.5]


def test_the_schedule_of_an_earlier_row_is_scored_if_its_options_are_those_of_today(tmp_path, rows_at):
    own, name = recorder(tmp_path, rows_at), "ld3, own trainer"
    own.solved = lambda **settings: {"nfe_spent": 3, "settings": settings}
    words = learned_solvers._schedule_command(own.schedule_flags(name, 3, 0)).split(" ")
    levels = {"sigmas": [80.0, 9.0, 2.0, 0.3, 0.002], "solver": "ipndm"}
    row = row_of(name, groups=False) | {"settings": levels, "command": " ".join(words[:2] + words[:1:-1])}
    found = own.again(row, None, None)
    assert found["settings"] == levels and (found["parameters"], found["calls"]) == (3, 3)
    more = row | {"settings": {**levels, "sigmas_cond": levels["sigmas"]}}
    assert own.again(more, None, None)["parameters"] == 6
    assert own.again(row | {"command": row["command"].replace("max_order=3", "max_order=4")}, None, None) is None


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("dyweight", {}),
        ("epd", {}),
        ("amed-table", {"first_step": "none"}),
        ("full", {"parallel": 2, "first_step": "zero"}),
    ],
)
def test_a_table_samples_as_the_student_it_is_of(preset, changes):
    student = SpanSolver.preset(preset, num_steps=5, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in student.groups().values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    again = learned_solvers.TableSolver(learned_solvers.table_of(student), ToyNet())
    expected = student.run(ToyNet(), common("latents2")).detach()
    size = float(expected.abs().max())  # tables are rounded to six places
    torch.testing.assert_close(again.run(ToyNet(), common("latents2")), expected, rtol=0, atol=2e-3 * size)
    assert again.evaluations() == student.evaluations()


# ---- tables --------------------------------------------------------------------------------------


def test_earlier_rows_are_marked_and_not_mixed_with_those_of_today():
    rows = [row_of("full", value=1.0, groups=False), row_of("full", value=3.0), row_of("gs", value=1.0, groups=False)]
    rows += [row_of("ld3", seed=seed, value=2.0 + 0.01 * seed) for seed in range(3)]
    lines = {line.split("|")[1].strip(): line for line in report_learned_solvers.main_table(rows, "fid", 2)}
    assert "3.00" in lines["full"] and "†" not in lines["full"] and "| 1 |" in lines["full"]
    assert "1.00 †" in lines["gs"] and "**" not in lines["gs"]
    assert "2.01 ± 0.01" in lines["ld3"] and "| 3 |" in lines["ld3"] and "**" not in lines["ld3"]  # gs: no interval
    differences = "\n".join(report_learned_solvers.difference_table(rows, "fid", 2, "full"))
    assert "ld3" in differences and "gs" not in differences
    rows[2] = row_of("gs", value=4.0, groups=False)
    assert "**2.01 ± 0.01**" in "\n".join(report_learned_solvers.main_table(rows, "fid", 2))
    rows.append(row_of("s4s", value=2.012))  # too near to tell
    assert "**" not in "\n".join(report_learned_solvers.main_table(rows, "fid", 2))
    rows[-1] = row_of("s4s", value=2.012, groups=False)
    assert "**" not in "\n".join(report_learned_solvers.main_table(rows, "fid", 2))
    alone = [row_of("full", value=3.0), row_of("gs", value=4.0, groups=False)]
    assert "**" not in "\n".join(report_learned_solvers.main_table(alone, "fid", 2))


def test_tables_do_not_mix_numbers_of_images():
    rows = [row_of("full", value=3.0) | {"images": 5000}, row_of("gs", value=1.0) | {"images": 1000}]
    rows += [row_of("full", nfe=8, value=0.5, groups=False) | {"images": 5000}]
    text = "\n".join(report_learned_solvers.main_table(rows, "fid", 2))
    assert "3.00" in text and "gs" not in text
    assert "| 8 |" not in text and "0.50" not in text  # no row of eight evaluations has an interval
    rows = [row_of("full", value=3.0) | {"images": 5000}, row_of("full", value=4.0) | {"images": 1000}]
    rows += [row_of("no contrast", value=4.5) | {"images": 1000, "part": "ablation"}]
    text = "\n".join(report_learned_solvers.ablation_table(rows))
    assert "| full | 4.00" in text and "3.00" not in text


def test_the_page_has_the_differences_of_the_tables():
    rows = [row_of("full", value=3.0), row_of("ld3", value=2.5), row_of("gs", value=1.0, groups=False)]
    text = report_learned_solvers.html_page({"digits": rows})
    stored = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text)[1])
    (pair,) = stored["fid"]["pairs"]
    wanted = report_learned_solvers.difference(rows[0:1], rows[1:2], "fid")
    assert pair[:2] == [2, 0] and pair[2] == pytest.approx(wanted.value)  # ld3, gs, full: gs has no groups
    assert pair[3] == pytest.approx(wanted.half_width) and "1.00 †" in text and "3.00 †" not in text


def test_the_target_compares_rows_of_as_many_images_as_the_teacher():
    plugin = "AMED-Plugin (iPNDM)"
    rows = [row_of("teacher", 30, None, 1.0), row_of(plugin, value=3.0), row_of("full", value=2.0)]
    rows += [row_of("gs", value=2.5), row_of("ld3", value=1.1) | {"images": 5000}]
    rows += [row_of("dyweight + spatial,time", value=1.2)]  # not a restriction: it has heads
    line = next(line for line in report_learned_solvers.target_table(rows) if line.startswith("| 3 | FID |"))
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["2.00", "1.00 (0.50)", "", "", "", "gs", "1.50"]


def test_rows_that_moved_by_more_than_their_interval():
    before = [row_of("full", value=2.0, groups=False), row_of("full", seed=1, value=9.0, groups=False)]
    before += [row_of("gs", value=2.0, groups=False), row_of("epd", value=2.0, groups=False)]
    now = [row_of("full", value=2.4), row_of("gs", value=2.001), row_of("epd", value=5.0, groups=False)]
    lines = [line.split("|")[1:6] for line in report_learned_solvers.moved(before, now)[2:]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["full", "3", title, *values]
        for title, values in zip(
            ("FID", "FID of the second classifier", "distance"),
            (("2.00", "2.40"), ("2.00", "2.40"), ("2.0000", "2.4000")),
            strict=True,
        )
    ]


def test_budgets_are_means_over_training_seeds():
    budget = {"calls": 3, "parameters": 6, "pairs": 448}
    rows = [row_of("epd", seed=seed) | budget | {"training_seconds": 20.0 + 4 * seed} for seed in range(2)]
    rows.append(row_of("epd", nfe=5) | budget | {"calls": 5})
    line = next(line for line in report_learned_solvers.budget_table(rows) if line.startswith("| epd |"))
    assert line == "| epd | 2/1 | 3 / 5 | 6 | 448 | 22 / - |"


# ---- intervals -----------------------------------------------------------------------------------


def measured(images, target, seed):
    """A row from features [N,D], as ``LearnedSolvers.scored`` makes it."""

    def score(part):
        return frechet_distance(part.mean(0).numpy(), np.cov(part.numpy().T), *target)

    return {"seed": seed, "current": True, **learned_solvers.left_out("fid", images, score)}


@pytest.mark.parametrize("training_seeds", [1, 3])
def test_intervals_hold_the_known_difference_nineteen_times_of_twenty(training_seeds):
    """Two methods with Gaussian images, so that the difference of their distances is known.

    The images of one noise differ little between the methods. Each training seed moves a method's
    mean a little.
    """
    generator = torch.Generator().manual_seed(0)
    dim, num, moved = 4, 200, 0.05 if training_seeds > 1 else 0.0
    repeats = 100 // training_seeds
    target = np.zeros(dim), np.eye(dim)
    first, second = 1.20, 1.25  # standard deviations: the distances are dim (s - 1)^2
    known = dim * ((first - 1) ** 2 - (second - 1) ** 2)
    inside, apart = 0, []
    for _ in range(repeats):
        noise = torch.randn(num, dim, generator=generator, dtype=torch.float64)
        groups = []
        for scale in (first, second):
            own = 0.1 * torch.randn(num, dim, generator=generator, dtype=torch.float64)
            rows = []
            for seed in range(training_seeds):
                trained = scale + moved * float(torch.randn([], generator=generator))
                rows.append(measured(trained * (noise + own) / math.sqrt(1.01), target, seed))
            groups.append(rows)
        found = report_learned_solvers.difference(*groups, "fid")
        inside += abs(found.value - known) <= found.half_width
        apart.append(found.half_width)
    assert inside / repeats >= 0.88
    assert np.mean(apart) < (0.06 if training_seeds == 1 else 0.4)  # they say something


def test_without_error_of_the_images_the_interval_is_that_of_welch():
    first, second = [1.0, 1.2, 1.15], [2.0, 2.6]
    groups = [
        [{"fid": value, "fid_left_out": [value] * 20, "current": True} for value in values]
        for values in (first, second)
    ]
    found = report_learned_solvers.difference(*groups, "fid")
    low, high = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    limits = found.value - found.half_width, found.value + found.half_width
    assert limits == pytest.approx((low, high), rel=1e-9)


def test_paired_intervals_are_far_narrower_than_unpaired_ones():
    generator = torch.Generator().manual_seed(0)
    target, noise = (np.zeros(4), np.eye(4)), torch.randn(400, 4, generator=generator, dtype=torch.float64)
    other = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    paired = report_learned_solvers.difference(
        [measured(1.2 * noise, target, 0)], [measured(1.25 * noise, target, 0)], "fid"
    )
    apart = report_learned_solvers.difference(
        [measured(1.2 * noise, target, 0)], [measured(1.25 * other, target, 0)], "fid"
    )
    assert paired.half_width < 0.3 * apart.half_width and paired.below_zero
