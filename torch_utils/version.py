"""The version of this code."""

import platform
import re
import subprocess
from pathlib import Path

from amed import __version__


def code_version() -> str:
    """Version of this code: the git commit in a checkout, else that of the installed package."""
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (FileNotFoundError, subprocess.TimeoutExpired):  # without git, use the package version
            done = None
        if done is not None and done.returncode == 0:
            return f"git-{done.stdout.strip()}"
    return __version__


def cpu_name() -> str:
    """The model name of the processor, as lscpu prints it, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()
