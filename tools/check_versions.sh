#!/usr/bin/env bash
# Tests this code with the lowest or the newest versions of the packages that pyproject.toml admits.
#
#     tools/check_versions.sh lowest|newest [REQUIREMENT...]
#     tools/check_versions.sh lowest click==8.2.1      # the others as low as possible
#
# Makes a virtual environment in VENV (default: .venv-lowest or .venv-newest), with the core packages
# and the extra "plot"; the newest also with "diffusers", which itself needs newer core packages.
# TORCH: version of torch, which is large (default: that of requirements.lock).
# PYTHON: interpreter that makes the environment. TESTS: replaces the fast part of the tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which=${1:-}
[ "$which" = lowest ] || [ "$which" = newest ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
shift
VENV=${VENV:-.venv-$which}
TORCH=${TORCH:-$(sed -n 's/^torch==//p' requirements.lock)}
TESTS=${TESTS:-tests/test_environments.py tests/test_doctor.py tests/test_cli_options.py tests/test_download.py
    tests/test_file_kind.py tests/test_weights_file.py tests/test_safe_pickle.py tests/test_checkpoint.py
    tests/test_dataset_tool.py tests/test_image_writer.py tests/test_frechet.py tests/test_fid_cli.py
    tests/test_sample_cli.py tests/test_train_cli.py tests/test_compare.py tests/test_solvers_golden.py
    tests/test_gits.py tests/test_dmn.py tests/test_zoo.py tests/test_offline.py}

[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"

# One line for each package: "name==lowest" or the declared range, except those that the command line names.
wanted=$("$VENV/bin/python" - "$which" "$TORCH" "$@" <<'PYTHON'
import re
import sys
import tomllib

which, torch, *given = sys.argv[1:]
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
chosen = {"torch": f"torch=={torch}"} | {re.match(r"[\w.-]*\w", text)[0]: text for text in given}
def choose(requirement, lowest):
    name = re.match(r"[\w.-]*\w", requirement)[0]
    chosen.setdefault(name, re.sub(r">=([\d.]+).*", r"==\1", requirement) if lowest else requirement)


for text in [*project["dependencies"], *extras["plot"], *(extras["diffusers"] if which == "newest" else [])]:
    choose(text, which == "lowest")
for text in extras["test"]:
    if text not in extras["diffusers"]:
        choose(text, False)
print("\n".join(chosen.values()))
PYTHON
)
# shellcheck disable=SC2086  (one argument for each word)
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade $wanted
echo "$which:" $("$VENV/bin/python" -m pip list --format=freeze --disable-pip-version-check |
    grep -iE '^(torch|numpy|click|pillow|scipy|requests|tqdm|safetensors|matplotlib|diffusers|transformers)==')
# shellcheck disable=SC2086
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$VENV/bin/python" -m pytest -q $TESTS
