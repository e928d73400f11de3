#!/usr/bin/env bash
# Optimised time schedules against fixed ones on an embedded network: finds schedules with every method for Euler, iPNDM and
# DPM-Solver++ (DMN for UniPC too) at 4, 5, 6 and 8 evaluations, trains AMED on the best grid, and compares them all, with the
# settings and budgets below. Repeating it continues where it stopped. Environment: PYTHON, OUT, NUM (images), NFE, SOLVERS,
# DATASET, SEEDS (of the methods that draw samples, at iPNDM with five evaluations), NPROC (schedules found at the same time).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DATASET=${DATASET:-digits}
OUT=${OUT:-runs/schedules-$DATASET}
NFE=${NFE:-4,5,6,8}
SOLVERS=${SOLVERS:-euler ipndm dpmpp}
mkdir -p "$OUT/files"

declare -A BUDGET=(
    [gits]="--num_warmup=64"
    [gits_l2]="--num_warmup=64 --metric=l2 --coeff=1.0"
    [dmn]=""
    [ofs]="--num_warmup=32"
    [evolution]="--num_samples=24 --solver_tea=ipndm --num_steps_tea=31 --population=12 --generations=4 --elites=4"
    [ld3]="--num_train=64 --num_valid=32 --rounds=10 --rounds_grid=4 --solver_tea=ipndm --num_steps_tea=31 --checkpointing=False"
)

commands() { # prints one command for every schedule that is wanted
    local name solver nfe seed dest
    for nfe in ${NFE//,/ }; do
        for solver in $SOLVERS unipc; do
            for name in dmn gits gits_l2 ofs ld3 evolution; do
                if [ "$solver" = unipc ] && [ "$name" != dmn ] && [ "$name" != gits ]; then continue; fi
                if [ "$name" = ofs ] && [ "$solver" != euler ]; then continue; fi # a bound of Euler's error
                if [ "$name" = gits_l2 ] && [ "$solver" != ipndm ]; then continue; fi
                for seed in 0 ${SEEDS:-1 2}; do
                    if [ "$seed" != 0 ] && { [ "$solver-$nfe" != ipndm-5 ] || [ "$name" = dmn ]; }; then continue; fi
                    dest="$OUT/files/$name-$solver-$nfe$([ "$seed" = 0 ] || echo "-seed$seed").json"
                    if [ -f "$dest" ]; then continue; fi
                    echo "$PYTHON optimize_schedule.py --dataset_name=$DATASET --method=${name%%_*} ${BUDGET[$name]} --solver=$solver" \
                        "$(options "$solver" " --" "=") --num_steps=$((nfe + 1)) --seed=$seed --dest=$dest"
                done
            done
        done
    done
}

options() { # of a solver, in the form that a command line takes
    case $1 in dpmpp | unipc) echo "${2}thresholding${3}False" ;; esac
}

commands | tr '\n' '\0' | xargs -0 -r -P "${NPROC:-1}" -I {} bash -c '{} >/dev/null 2>'"$OUT/errors.txt"' || { cat '"$OUT/errors.txt"'; exit 255; }'

methods=()
for solver in $SOLVERS; do
    for fixed in polynomial:schedule_rho=7 time_uniform:schedule_rho=1 logsnr; do
        methods+=("$solver$(options "$solver" : =):schedule_type=$fixed")
    done
done
for file in "$OUT"/files/*.json; do
    name=$(basename "$file" .json)
    seed=${name#*-seed}
    if [ "$seed" = "$name" ]; then seed=""; else name=${name%-seed*}; fi
    solver=${name#*-}
    solver=${solver%-*}
    method="$solver$(options "$solver" : =):schedule=$OUT/files/${name%-*}-{nfe}${seed:+-seed$seed}.json"
    case " ${methods[*]} " in *" $method "*) ;; *) methods+=("$method") ;; esac
done
methods+=("unipc:thresholding=False:schedule_type=logsnr" "unipc:thresholding=False:schedule_type=time_uniform:schedule_rho=1")
run() {
    "$PYTHON" compare.py --dataset_name="$DATASET" --nfe="$NFE" --num_images="${NUM:-256}" --groups=4 --num_reference=128 \
        --solvers="$(IFS=,; echo "${methods[*]}")" --outdir="$OUT" "$@"
}
run
# AMED-Plugin(iPNDM) on the best grid: LD3's of two evaluations less for each pair that the predictor inserts.
predictors=()
for grid in "$OUT"/files/ld3-ipndm-4.json "$OUT"/files/gits-ipndm-4.json; do
    outdir="$OUT/exps/$(basename "$grid" .json)"
    if ! compgen -G "$outdir/*/predictor-*.safetensors" >/dev/null; then
        rm -rf "$outdir"
        plain="$OUT/files/$(basename "$grid" .json)-plain.sigmas"
        "$PYTHON" -c 'import json,sys; print(",".join(map(repr, json.load(open(sys.argv[1]))["sigmas"])))' "$grid" >"$plain"
        "$PYTHON" train.py --dataset_name="$DATASET" --outdir="$outdir" --sampler_stu=ipndm --sampler_tea=ipndm --M=4 --afs=False \
            --scale_dir=0.2 --scale_time=0.3 --max_order=2 --total_kimg="${KIMG:-1}" --batch=16 --seed=0 --sigmas="$(cat "$plain")"
    fi
    predictors+=("$(compgen -G "$outdir/*/predictor-*.safetensors" | sort | tail -n 1)")
done
run --predictor_path="$(IFS=,; echo "${predictors[*]}")"
