#!/usr/bin/env bash
# CIFAR-10 by a ResNet-18 with a stem for 32 pixels: 10,000 images in half an hour of one CPU core
# or two, or with ON=gpu all 50,000 images in minutes.
#
#   DATA=cifar10:ROOT TEST=cifar10:ROOT@test bash examples/cifar10.sh
#   ON=gpu DATA=cifar10:ROOT TEST=cifar10:ROOT@test bash examples/cifar10.sh
#
# Writes to OUT (runs/cifar10); given again, it goes on. DATA and TEST may be folders of images with
# a subfolder for each class, or packed files; without TEST there is no accuracy on test images.
# More options go to `sela run`.
set -euo pipefail

DATA=${DATA:-cifar10:data}
OUT=${OUT:-runs/cifar10}

SHARED=(--preset cifar10 --arch resnet18 --image-size 32 --precision bfloat16 --heads 128x10
    --relabel linear --relabel-heads all --view random --lr-schedule cosine)
if [ "${ON:-cpu}" = gpu ]; then
    RECIPE=(--epochs 230 --opts 46 --batch-size 256 --lr 0.1
        --assign argmax --store features --dtype float16 --device cuda)
    PROBED=(--device cuda)
else
    RECIPE=(--limit 10000 --epochs 12 --opts 12 --batch-size 64 --lr 0.05)
    PROBED=(--limit 10000)
fi

# A finished run is not gone on with.
if [ ! -e "$OUT/rounds.csv" ] || [ $# -gt 0 ]; then
    sela run --data "$DATA" "${SHARED[@]}" "${RECIPE[@]}" --out "$OUT" "$@"
fi

# After a dry run there is nothing to probe.
if [ -n "${TEST:-}" ] && [ -e "$OUT/rounds.csv" ]; then
    # kNN and a linear classifier, whose rate a tenth of the training images chooses.
    sela probe --data "$DATA" --test "$TEST" -c "$OUT/checkpoint.h5" "${PROBED[@]}" \
        --layers layer4 --method both --epochs 10 --lr 0.01,0.03,0.1 --aug crop-flip --precision bfloat16 \
        -o "$OUT/test.h5" --force
fi
