#!/usr/bin/env bash
# The comparison of every solver on the embedded digits network (benchmarks/digits/): trains the AMED predictors of
# every number of evaluations, then compares them with the plain solvers on their customary schedules, and with iPNDM and
# DPM-Solver++ on the settings that the demo tuned for digits. Repeating it continues where it stopped. Environment: PYTHON,
# OUT, KIMG (length of each training), NUM (images), NFE (of the plain solvers), BASES (further students at five evaluations),
# NPROC (processes of the comparison).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/compare-digits}

train() { # train NFE STUDENT FLAGS...: odd numbers of evaluations take the free first step, even ones do not
    local nfe=$1 student=$2 afs=False steps=$(($1 / 2 + 1)) outdir
    shift 2
    if [ $((nfe % 2)) = 1 ]; then afs=data steps=$(((nfe + 1) / 2 + 1)); fi
    outdir="$OUT/exps/$student-$nfe"
    if ! compgen -G "$outdir/*/predictor-*.safetensors" >/dev/null; then
        rm -rf "$outdir"
        "$PYTHON" train.py --dataset_name=digits --outdir="$outdir" --num_steps="$steps" --afs="$afs" --sampler_stu="$student" \
            --total_kimg="${KIMG:-1}" --batch=16 --seed=0 --schedule_type=time_uniform "$@"
    fi
    predictors+=("$(compgen -G "$outdir/*/predictor-*.safetensors" | sort | tail -n 1)")
}

predictors=()
PLUGIN="--sampler_tea=ipndm --M=4 --scale_dir=0.2 --scale_time=0.3 --schedule_rho=1.4"
for nfe in 3 4 5 6 8 10; do
    train "$nfe" amed --sampler_tea=heun --M=1 --scale_dir=0.01 --scale_time=0 --schedule_rho=1
    train "$nfe" ipndm --max_order=2 $PLUGIN
    train "$nfe" dpmpp --max_order=3 --thresholding=False $PLUGIN
done
for student in ${BASES:-euler dpm ipndm_v deis}; do train 5 "$student" --max_order=2 $PLUGIN; done

TUNED=schedule_type=time_uniform:schedule_rho=1:afs=data:max_order=3
solvers=${SOLVERS:-euler,heun,dpm,dpmpp:thresholding=False,unipc:thresholding=False,deis,ipndm,ipndm_v,pfdiff,edm,evodiff,dpm_v3}
if ! compgen -G "src/digits/dpm_v3-*.safetensors" >/dev/null; then "$PYTHON" -m tools.model_statistics --dataset_name=digits; fi
run=("$PYTHON")
if [ "${NPROC:-1}" -gt 1 ]; then run=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC"); fi
"${run[@]}" compare.py --dataset_name=digits --presets=published --nfe="${NFE:-3,4,5,6,8,10}" --num_images="${NUM:-1000}" --groups=5 --num_reference=256 \
    --solvers="$solvers,ipndm:$TUNED,dpmpp:$TUNED:thresholding=False" \
    --predictor_path="$(IFS=,; echo "${predictors[*]}")" --outdir="$OUT"
