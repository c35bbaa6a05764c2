#!/usr/bin/env bash
# Real logits for `make bench-label`: CIFAR-10 by a fresh, a half-trained and a trained network.
#
#   DATA=cifar10:ROOT OUT=benchmarks/inputs bash benchmarks/label_inputs.sh
#
# About 12 minutes on two cores. DATA may be a folder of the 50,000 images.
set -euo pipefail

DATA=${DATA:?where CIFAR-10 is: cifar10:ROOT or a folder of images}
OUT=${OUT:-benchmarks/inputs}
network=(--arch alexnet-small --image-size 32 --heads 128,1000)

mkdir -p "$OUT"
sela embed --data "$DATA" "${network[@]}" --store logits -o "$OUT/fresh.h5" --force
for stage in half:2 trained:4; do
    name=${stage%:*}
    sela run --data "$DATA" "${network[@]}" --preset cifar10 --epochs "${stage#*:}" --opts 8 \
        --lamb 25 --lr-schedule constant --precision bfloat16 --assign argmax -o "$OUT/$name" --force
    sela embed --data "$DATA" --checkpoint "$OUT/$name/checkpoint.h5" --store logits \
        -o "$OUT/$name.h5" --force
done
