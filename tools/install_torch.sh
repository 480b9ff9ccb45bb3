#!/usr/bin/env bash
# install_torch.sh PYTHON CONSTRAINTS: the pinned torch. On Linux without a GPU the CPU build, which is a tenth of the size:
# from the configured package indexes, else from PyTorch's own, else the plain build, with a warning.
set -euo pipefail
python=$1 constraints=$2
want=$(sed -n 's/^torch==//p' "$constraints")
cpu_index=https://download.pytorch.org/whl/cpu
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

have=$("$python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
if [ "${have%%+*}" = "$want" ]; then echo "torch $have is there"; exit 0; fi

gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then gpu=yes; fi
done=no
if [ "$gpu" = no ] && [ "$(uname -s)" = Linux ]; then
    log=$(mktemp)
    if pip install -qq "torch==$want+cpu" 2>"$log"; then done=yes
    elif pip install -qq --retries 1 --timeout 20 --index-url "$cpu_index" --extra-index-url https://pypi.org/simple "torch==$want+cpu" 2>>"$log"; then done=yes
    else echo "no CPU build of torch $want found; trying the plain one"; fi
    if [ "$done" = no ]; then tail -2 "$log"; fi
    rm -f "$log"
fi
if [ "$done" = no ]; then
    pip install -qq "torch==$want" || pip install -qq --index-url "$cpu_index" --extra-index-url https://pypi.org/simple "torch==$want" || {
        echo "error: torch $want could not be installed; see above. Python 3.11, 3.12 and 3.13 have builds: make PYTHON=... env" >&2; exit 1; }
fi
"$python" -c '
import torch
print("torch", torch.__version__)
if torch.version.cuda and not torch.cuda.is_available(): print("warning: this is a CUDA build and there is no GPU here; it works, and takes more disk than the CPU build")'
