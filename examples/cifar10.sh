#!/usr/bin/env bash
# CIFAR-10 within an hour or two of one CPU core: 10,000 images, a ResNet-18 with a 32-px stem.
#
#   DATA=cifar10:ROOT OUT=runs/cifar10 bash examples/cifar10.sh
#
# DATA may be a folder of images with a subfolder for each class. More options go to `sela run`.
set -euo pipefail

DATA=${DATA:-cifar10:data}
OUT=${OUT:-runs/cifar10}

sela run --data "$DATA" --limit 10000 --preset cifar10 --arch resnet18 --image-size 32 \
    --precision bfloat16 --heads 128x10 --epochs 24 --opts 24 --relabel linear \
    --relabel-heads all --batch-size 64 --lr 0.05 --lr-schedule cosine --view random \
    --out "$OUT" "$@"
