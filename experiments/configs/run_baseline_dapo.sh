#!/usr/bin/env bash
# Baseline DAPO: no feedback, no replay. Starts from the same weights, tasks and seed as run_feedback_guided_dapo.sh.
#   bash experiments/configs/run_baseline_dapo.sh                                     # Qwen3-8B with LoRA on 8 GPUs of 24 GB
#   CONFIG=experiments/configs/verl_cpu.yaml bash experiments/configs/run_baseline_dapo.sh # the tiny policy on a CPU
#   bash experiments/configs/run_baseline_dapo.sh --set seed=1 --set train.rollouts=6  # further options of fg-dapo train
# RAY_ADDRESS=host:6379 joins a cluster; otherwise Ray starts on this machine. WANDB_MODE=offline keeps W&B's files here.
set -euo pipefail
cd "$(dirname "$0")/../.."
config=${CONFIG:-experiments/configs/verl_8x4090_lora.yaml}
seed=${SEED:-0}
exec fg-dapo train --config "$config" --out "${OUT:-runs/$(basename "$config" .yaml)/dapo-s$seed}" --set arm=dapo --set "seed=$seed" \
    --set algorithm.feedback_guidance.enable=false --set algorithm.transfer.mode=none "$@"
