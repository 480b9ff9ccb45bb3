#!/usr/bin/env bash
# Feedback-guided DAPO with replay. Starts from the same weights, tasks and seed as run_baseline_dapo.sh.
#   bash experiments/configs/run_feedback_guided_dapo.sh                                     # Qwen3-8B with LoRA on 8 GPUs of 24 GB
#   CONFIG=experiments/configs/verl_cpu.yaml bash experiments/configs/run_feedback_guided_dapo.sh # the tiny policy on a CPU
#   ARM=fg_plan bash experiments/configs/run_feedback_guided_dapo.sh --set algorithm.transfer.mode=none  # as in the plan: no transfer
# RAY_ADDRESS=host:6379 joins a cluster; otherwise Ray starts on this machine. WANDB_MODE=offline keeps W&B's files here.
set -euo pipefail
cd "$(dirname "$0")/../.."
config=${CONFIG:-experiments/configs/verl_8x4090_lora.yaml}
seed=${SEED:-0} arm=${ARM:-fg_replay}
exec fg-dapo train --config "$config" --out "${OUT:-runs/$(basename "$config" .yaml)/$arm-s$seed}" --set "arm=$arm" --set "seed=$seed" \
    --set algorithm.feedback_guidance.enable=true "$@"
