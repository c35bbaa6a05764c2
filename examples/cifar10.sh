#!/usr/bin/env bash
# CIFAR-10 within an hour or two of one CPU core: 10,000 images, a ResNet-18 with a 32-px stem;
# or with ON=gpu all 50,000 images, in minutes.
#
#   DATA=cifar10:ROOT OUT=runs/cifar10 bash examples/cifar10.sh
#   ON=gpu DATA=cifar10:ROOT OUT=runs/cifar10 bash examples/cifar10.sh
#
# DATA may be a folder of images with a subfolder for each class, or a packed file. More options
# go to `sela run`.
set -euo pipefail

DATA=${DATA:-cifar10:data}
OUT=${OUT:-runs/cifar10}

SHARED=(--preset cifar10 --arch resnet18 --image-size 32 --precision bfloat16 --heads 128x10
    --relabel linear --relabel-heads all --view random --lr-schedule cosine)
if [ "${ON:-cpu}" = gpu ]; then
    RECIPE=(--epochs 230 --opts 28 --batch-size 256 --lr 0.1 --assign argmax
        --store features --dtype float16 --device cuda)
else
    RECIPE=(--limit 10000 --epochs 24 --opts 24 --batch-size 64 --lr 0.05)
fi

sela run --data "$DATA" "${SHARED[@]}" "${RECIPE[@]}" --out "$OUT" "$@"
