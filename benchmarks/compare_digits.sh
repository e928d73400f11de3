#!/usr/bin/env bash
# Every solver with its published settings on the embedded digits network, beside the two tuned plain
# solvers and the shipped predictors: writes benchmarks/digits_comparison.{md,csv}. About 25 minutes of
# one CPU core per number of evaluations. A repeat continues where it stopped. Environment: PYTHON,
# OUT, NUM (images), NFE, NPROC (processes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-runs/compare-digits}
NFE=${NFE:-3,6}

predictors=()
for nfe in ${NFE//,/ }; do
    for kind in amed plugin span; do
        if [ -e "models/predictors/digits-$kind-$nfe.safetensors" ]; then predictors+=("digits-$kind-$nfe"); fi
    done
done
TUNED=schedule_type=time_uniform:schedule_rho=1:afs=data:max_order=3
solvers=${SOLVERS:-euler,heun,dpm,dpmpp:thresholding=False,unipc:thresholding=False,deis,ipndm,ipndm_v,pfdiff,edm,evodiff,dpm_v3}
if ! compgen -G "src/digits/dpm_v3-*.safetensors" >/dev/null; then "$PYTHON" -m tools.model_statistics --dataset_name=digits; fi
run=("$PYTHON")
if [ "${NPROC:-1}" -gt 1 ]; then run=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC"); fi
"${run[@]}" compare.py --dataset_name=digits --presets=published --nfe="$NFE" --num_images="${NUM:-5000}" --num_reference=256 \
    --solvers="$solvers,ipndm:$TUNED,dpmpp:$TUNED:thresholding=False" \
    --predictor_path="$(IFS=,; echo "${predictors[*]}")" --outdir="$OUT"
