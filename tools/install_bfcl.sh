#!/usr/bin/env bash
# install_bfcl.sh PYTHON CONSTRAINTS: the Berkeley function calling benchmark's data and simulators, for fg_dapo.domains.bfcl.
# Without its dependencies: it pins old versions of some thirty packages, and what we use needs mpmath only.
set -euo pipefail
python=$1 constraints=$2
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

pip install -qq -c "$constraints" mpmath
pip install -qq -c "$constraints" --no-deps bfcl-eval
"$python" -c 'from fg_dapo.domains.bfcl.package import bfcl_classes; bfcl_classes()' || { echo "error: bfcl-eval was installed and cannot be used; see above" >&2; exit 1; }
