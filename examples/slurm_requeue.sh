#!/usr/bin/env bash
# A run on a cluster that stops jobs: two minutes before its time is over the run saves its
# state, the job is queued again, and the next one goes on. What follows the script's name
# goes to `sela run`:
#
#   sbatch examples/slurm_requeue.sh --data photos/ --out runs/photos --epochs 50 --opts 25
#
# A job that is preempted is queued again by Slurm itself (--requeue).
#SBATCH --job-name=sela
#SBATCH --time=04:00:00
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

sela run "$@" &
run=$!
# The signals come to this shell alone.
trap 'kill -USR1 $run' USR1
trap 'kill -TERM $run' TERM

# A signal ends `wait` too, while the run is still saving; waiting for what is over already
# gives its exit code once more.
wait "$run"
while kill -0 "$run" 2>/dev/null; do
  wait "$run"
done
wait "$run"
code=$?

if ((code == 75)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
