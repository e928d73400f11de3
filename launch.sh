#!/usr/bin/env bash
# Recipes: ./launch.sh demo | test | install, or the name of a setting of the paper.
# Environment variables:
#   PYTHON: interpreter, 3.11 or newer
#   NPROC: processes of torchrun (default: one per GPU)
#   VENV: folder of the virtual environment (default: .venv)
#   TEST_PROCESSES: processes of the test suite (default: 2)
#   CPU: 1 installs the CPU build of torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VENV=${VENV:-.venv}

find_python() { # prints an interpreter that is new enough; tries only $PYTHON if it is set
    local candidate
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

die() {
    echo "Error: $*" >&2
    exit 2
}

# install EXTRAS: make a virtual environment with the tested versions. A stamp file records them.
install() {
    local extras=${1:-} stamp wanted python
    stamp="$VENV/.installed${extras:+-$extras}"
    wanted=$(cat pyproject.toml requirements.lock | cksum)
    if [ -x "$VENV/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then # absent or incomplete
        python=$(find_python) || die "no Python 3.11 or newer${PYTHON:+ at PYTHON=$PYTHON}; install one or set PYTHON"
        "$python" -m venv --clear "$VENV"
    fi
    echo "installing into $VENV (once) ..."
    local index=()
    if [ "${CPU:-0}" = 1 ]; then
        index=(--extra-index-url https://download.pytorch.org/whl/cpu)
    elif [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        echo "no NVIDIA GPU found: with CPU=1 before the command, torch comes without gigabytes of CUDA libraries"
    fi
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check ${index[@]+"${index[@]}"} -c requirements.lock -e ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
}

nproc_default() { "$VENV/bin/python" -c 'import torch; print(max(torch.cuda.device_count(), 1))'; }

launch() { # plain python on one process, torchrun on several
    if [ "$NPROC" -gt 1 ]; then
        "$VENV/bin/python" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" "$@"
    else
        "$VENV/bin/python" "$@"
    fi
}

# recipe DATASET NAME KIMG PUBLISHED-FID TRAIN-FLAGS...: train, sample 50,000 images, print the FID
recipe() {
    local dataset=$1 name=$2 kimg=$3 published=$4 exps last predictor images
    shift 4
    install
    NPROC=${NPROC:-$(nproc_default)}
    exps="exps/$dataset-$name"
    last="$exps/[0-9]*/predictor-$(printf %06d "$kimg").safetensors"
    # A finished predictor is reused, so that an interrupted sampling resumes.
    if ! compgen -G "$last" >/dev/null; then
        launch train.py --dataset_name="$dataset" --outdir="$exps" --total_kimg="$kimg" "$@"
    fi
    predictor=$(compgen -G "$last" | sort | tail -n 1)
    images="samples/$dataset/$name/$(basename "$(dirname "$predictor")")"
    launch sample.py --predictor_path="$predictor" --batch="${BATCH:-128}" --seeds="${SEEDS:-0-49999}" --outdir="$images"
    launch fid.py calc --images="$images" --ref="${REF:-$dataset}" --json="$images/fid.json"
    echo "published for $dataset, 5 NFE: $published (arXiv 2312.00094 and the tables of its authors)"
}

AMED="--sampler_stu=amed --sampler_tea=heun --num_steps=4 --M=1 --afs=True --scale_dir=0.01 --scale_time=0
      --schedule_type=time_uniform --schedule_rho=1"
IPNDM="--sampler_stu=ipndm --sampler_tea=ipndm --num_steps=4 --M=2 --afs=True --scale_dir=0.01
       --schedule_type=polynomial --schedule_rho=7 --max_order=4"

SPAN="--sampler_stu=span --num_steps=7 --batch=32 --batch-gpu=auto --pairs=2048"

case "${1:-help}" in
demo)
    shift
    install
    "$VENV/bin/python" -m tools.demo "$@"
    ;;
test)
    shift
    install test
    # Two processes with one thread each, since many tests wait for programs that they start.
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$VENV/bin/python" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
    ;;
install) install "${2:-}" ;;
# shellcheck disable=SC2086  # the flag strings are lists
cifar10-amed) recipe cifar10 amed 10 "AMED-Solver 7.59" $AMED --batch=128 ;;
cifar10-ipndm) recipe cifar10 ipndm 10 "AMED-Plugin 6.61" $IPNDM --batch=128 --scale_time=0.2 ;;
ffhq-amed) recipe ffhq amed 10 "AMED-Solver 14.80" $AMED --batch=64 ;;
ffhq-ipndm) recipe ffhq ipndm 10 "AMED-Plugin 12.49" $IPNDM --batch=64 --scale_time=0 ;;
imagenet64-amed) recipe imagenet64 amed 10 "AMED-Solver 10.74" $AMED --batch=64 ;;
imagenet64-ipndm) recipe imagenet64 ipndm 10 "AMED-Plugin 13.83" $IPNDM --batch=64 --scale_time=0 ;;
# The span solver with five evaluations. The figures are those of the AMED-Plugin, for comparison.
cifar10-span) recipe cifar10 span 64 "AMED-Plugin 6.61" $SPAN ;;
ffhq-span) recipe ffhq span 64 "AMED-Plugin 12.49" $SPAN ;;
imagenet64-span) recipe imagenet64 span 64 "AMED-Plugin 13.83" $SPAN ;;
*)
    cat <<HELP
./launch.sh demo     installs; a first picture at once, then trains, samples and measures (CPU, minutes)
./launch.sh demo --full     the same on both included networks, every method trained, 1,000 images
./launch.sh test     installs the test packages and runs the test suite
./launch.sh install [EXTRA]
./launch.sh {cifar10,ffhq,imagenet64}-{amed,ipndm}    the paper's settings: train, sample 50,000 images, FID
./launch.sh {cifar10,ffhq,imagenet64}-span            the same with the span solver
    NPROC=8 ./launch.sh cifar10-amed     on 8 GPUs (default: all GPUs)
HELP
    [ "${1:-help}" = help ] || die "unknown recipe '$1'"
    ;;
esac
