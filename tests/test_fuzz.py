"""The short run of tests/fuzz_loaders.py, the files that once failed, and its sensitivity."""

import os
import random
import socket

import fuzz_loaders
import pytest
from fuzz_loaders import CORPUS, TARGETS, Target, Watch, attempt, make_files, run
from fuzz_mutations import mutate

from torch_utils.errors import UserError


def report(failures):
    return "\n".join(f"{f['number']} {f['file']}: {f['why']}\n{f.get('trace', '')}" for f in failures[:5])


def test_a_few_hundred_damaged_files(tmp_path):
    counts, failures, peak = run(count=300, seed=0, workers=1, keep=tmp_path / "found")
    assert not failures, report(failures)
    assert sum(counts.values()) == 300 and {file for file, _ in counts} == {target.file for target in TARGETS}
    assert sum(number for (_, result), number in counts.items() if result == "refused") > 150
    assert 0 < peak < 1500


@pytest.mark.slow
def test_twenty_thousand_damaged_files(tmp_path):
    _, failures, _ = run(count=20_000, seed=2, workers=os.cpu_count() or 1)
    assert not failures, report(failures)


@pytest.mark.parametrize("case", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_what_once_broke_something(case, tmp_path, monkeypatch):
    """<seed>-<number>-<file of a target>, or h-... for files made by a person.

    Some load by now, since what is wrong in them does no harm.
    """
    target = next(t for t in TARGETS if t.file == case.name.split("-", 2)[2])
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    (place / "net.pkl").write_bytes(b"")
    outcome = attempt(target, case.read_bytes(), place, Watch())
    assert outcome["result"] != "failed", outcome


def test_cases_depend_on_their_number_alone(tmp_path):
    make_files(tmp_path)
    good = {target.file: (tmp_path / target.file).read_bytes() for target in TARGETS}
    for number in range(len(TARGETS)):
        data = fuzz_loaders.damaged(good, 5, number)[1]
        assert data == fuzz_loaders.damaged(good, 5, number)[1]
        others = {fuzz_loaders.damaged(good, seed, number)[1] for seed in range(6)}
        assert len(others) > 1, TARGETS[number].file
    for kind in ("pickle", "zip", "json", "safetensors", "bytes"):
        assert isinstance(mutate(b"", kind, random.Random(0)), bytes)


def test_it_notices_what_it_looks_for(tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    watch = Watch()

    def outcome(load):
        return attempt(Target("x.bin", "bytes", load), b"x", place, watch)

    def refuse(path):
        raise UserError("no")

    assert outcome(lambda path: None) == {"result": "loaded"} and outcome(refuse) == {"result": "refused"}
    assert "ZeroDivisionError" in outcome(lambda path: 1 / 0)["why"]
    assert "RecursionError" in outcome(lambda path: (_ for _ in ()).throw(RecursionError()))["why"]
    assert "os.system" in outcome(lambda path: os.system("true"))["why"]
    assert "socket." in outcome(lambda path: socket.socket().close())["why"]
    assert "EXECUTED" in outcome(lambda path: open("EXECUTED", "w").close())["why"]
