"""benchmarks/gpu_check.sh: it skips, resumes, and writes one JSON and one Markdown page."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu_check

ROOT = Path(__file__).resolve().parents[1]


def test_the_shell_script_skips_what_is_absent(tmp_path):
    settings = {"PYTHON": sys.executable, "SMALL": "1", "ONLY": "nccl", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu_check.sh", tmp_path / "out"],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nccl: skipped: 0 GPUs" in done.stdout
    record = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert list(record["parts"]) == ["nccl"] and record["small"]
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "| nccl | skipped: 0 GPUs |" in page and "the figures mean nothing" in page


def test_what_failed_is_tried_again(tmp_path, monkeypatch):
    """What is done is not repeated, and the page has all of it."""
    calls = []

    def sampling(device, small):
        calls.append("sampling")
        return {"2": {"network": 1.0, "sampling": 1.5, "images per second": 4.0}}

    def absent(device, small):
        calls.append("absent")
        raise gpu_check.Skipped("no such thing")

    def program(device, small):
        calls.append("program")
        return gpu_check.run_program([sys.executable, "-c", "raise SystemExit('no | memory')"], 60)

    found = {"sampling, eager": sampling, "absent": absent, "program": program}
    monkeypatch.setattr(gpu_check, "parts", lambda small: found)
    for _ in range(2):
        done = CliRunner().invoke(gpu_check.main, [f"--outdir={tmp_path}", "--device=cpu"], catch_exceptions=False)
        assert done.exit_code == 0
        page = (tmp_path / "gpu_check.md").read_text()
        assert "| sampling, eager | batch 2: 1.500 of the network, 4 img/s |" in page
        assert "| absent | skipped: no such thing |" in page
        assert "| program | failed: RuntimeError: exit 1: no / memory |" in page
        assert list(json.loads((tmp_path / "gpu_check.json").read_text())["parts"]) == list(found)
    assert calls == ["sampling", "absent", "program", "program"] and "absent: done before" in done.output


def test_solvers_are_compared_with_the_cpu():
    found = gpu_check.solvers(torch.device("cpu"), small=True)
    assert len(found["differences"]) == 4 and set(found["differences"].values()) == {0.0}
    record = {"machine": "", "code": "", "system": "", "small": True, "parts": {"s": {"result": found, "seconds": 1}}}
    assert "by at most 0 (euler); at most 0 waits in a run (euler)" in gpu_check.page(record)


@pytest.mark.parametrize("small", [True, False])
def test_a_wrong_name_is_one_line(small, tmp_path):
    done = CliRunner().invoke(gpu_check.main, [f"--outdir={tmp_path}", "--only=cooking", *(["--small"] * small)])
    assert (
        done.exit_code == 2 and "--only=cooking: the parts are doctor; tests; solvers; sampling, eager" in done.output
    )
