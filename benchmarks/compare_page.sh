#!/usr/bin/env bash
# The picture of compare.py's page in docs/comparing.md: a small comparison on the digits (about 8 minutes of one CPU core),
# and a screenshot by Chromium. Environment: PYTHON, CHROMIUM, OUT (continued if it exists), DEST.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
CHROMIUM=${CHROMIUM:-chromium}
OUT=${OUT:-runs/compare-page}
DEST=${DEST:-docs/comparing.png}

"$PYTHON" compare.py --dataset_name=digits --solvers=euler,heun,dpmpp,unipc,ipndm --nfe=4,5,6 --num=600 --num_reference=60 \
    --predictor_path=digits-span-4,digits-span-5,digits-span-6,digits-plugin-5 --baseline=ipndm --outdir="$OUT"
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
flags=(--headless --disable-gpu --hide-scrollbars --no-first-run --disable-background-networking "--user-data-dir=$profile")
if [ "$(id -u)" = 0 ]; then flags+=(--no-sandbox); fi
"$CHROMIUM" "${flags[@]}" --window-size=1366,950 --screenshot="$profile/page.png" "file://$(realpath "$OUT")/index.html"
"$PYTHON" - "$profile/page.png" "$DEST" <<'END' # 64 colours: a third of the bytes
import sys
from PIL import Image
Image.open(sys.argv[1]).convert("RGB").quantize(64).save(sys.argv[2], optimize=True)
END
