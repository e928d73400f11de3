#!/usr/bin/env bash
# What a GPU says of this project, in about 15 minutes of one H100:
#
#     benchmarks/gpu_check.sh [FOLDER]
#
# Writes FOLDER/gpu_check.json and FOLDER/gpu_check.md (default folder: gpu_check). A part that is
# done is not repeated: call it again after an interruption, or delete its file in FOLDER/parts.
# Parts that this machine cannot run are skipped, and the page says why. Parts that failed are tried
# again. ONLY=sampling runs only the parts with this text in their names. SMALL=1 makes everything as
# small as possible, to see that the script works; its figures mean nothing.
set -u
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m benchmarks.gpu_check --outdir="${1:-gpu_check}" ${SMALL:+--small} ${ONLY:+--only="$ONLY"}
