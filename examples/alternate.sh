#!/usr/bin/env bash
# The loop of `sela run`, spelled out: the same files, with the same payload digests (where
# `--precision auto` decides alike).
#
#   DATA=digits OUT=runs/alternate bash examples/alternate.sh
#
# Each command can run on a machine of its own; all state is in the files.
set -euo pipefail

DATA=${DATA:-digits}
OUT=${OUT:-runs/alternate}
ARCH=${ARCH:-resnet18}
IMAGE_SIZE=${IMAGE_SIZE:-16}
HEADS=${HEADS:-10,20,40,80}
HEAD_INIT=${HEAD_INIT:-kmeans}
EPOCHS=${EPOCHS:-16}
OPTS=${OPTS:-9}
RELABEL=${RELABEL:-linear}
RELABEL_HEADS=${RELABEL_HEADS:-all}
LAMB=${LAMB:-10}
SEED=${SEED:-0}
LIMIT=${LIMIT:-}
VIEW=${VIEW:-random}
TRAINING=${TRAINING:---batch-size 64 --lr 0.03 --lr-milestones 0.6,0.8 --weight-decay 5e-4 --aug crop --precision auto}

mkdir -p "$OUT"
images=(--data "$DATA" ${LIMIT:+--limit "$LIMIT"})

# T, of 128x10 or 10,20,40,80.
heads=0
for part in ${HEADS//,/ }; do
    case $part in *x*) heads=$((heads + ${part#*x})) ;; *) heads=$((heads + 1)) ;; esac
done

# A head that ran out of iterations (exit 75) is good enough to train on: its labels are written.
label() { sela label "$@" || test $? -eq 75; }

# Round 0: a fresh network, and random balanced labels, for which its logits name the images.
sela embed "${images[@]}" --arch "$ARCH" --image-size "$IMAGE_SIZE" --heads "$HEADS" \
    --seed "$SEED" -o "$OUT/logits.h5"
label "$OUT/logits.h5" --assign random --seed "$SEED" -o "$OUT/labels-000.h5"
# shellcheck disable=SC2086 # TRAINING is a list of options
sela train "${images[@]}" --labels "$OUT/labels-000.h5" --arch "$ARCH" \
    --image-size "$IMAGE_SIZE" --head-init "$HEAD_INIT" --seed "$SEED" --epochs "$EPOCHS" \
    $TRAINING --to 0 -o "$OUT/checkpoint-000.h5"

last=000
round=0
for position in $(sela schedule --epochs "$EPOCHS" --opts "$OPTS" --relabel "$RELABEL"); do
    round=$((round + 1))
    now=$(printf %03d "$round")
    sela train "${images[@]}" --labels "$OUT/labels-$last.h5" \
        --checkpoint "$OUT/checkpoint-$last.h5" --to "$position" -o "$OUT/checkpoint-$now.h5"
    sela embed "${images[@]}" --checkpoint "$OUT/checkpoint-$now.h5" --view "$VIEW" \
        -o "$OUT/logits.h5" --force
    head=
    # Heads that begin as clusters are all labelled at first.
    if [ "$RELABEL_HEADS" = cycle ] && [ "$round $HEAD_INIT" != "1 kmeans" ]; then
        head=$(((round - 1) % heads))
    fi
    label "$OUT/logits.h5" --lamb "$LAMB" --seed "$SEED" --init "$OUT/labels-$last.h5" \
        ${head:+--head "$head"} -o "$OUT/labels-$now.h5"
    rm "$OUT/checkpoint-$last.h5"
    last=$now
done

sela train "${images[@]}" --labels "$OUT/labels-$last.h5" \
    --checkpoint "$OUT/checkpoint-$last.h5" -o "$OUT/checkpoint.h5"
rm "$OUT/checkpoint-$last.h5"
cp "$OUT/labels-$last.h5" "$OUT/labels.h5"
