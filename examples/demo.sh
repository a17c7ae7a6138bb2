#!/usr/bin/env bash
# Draw emoji with the small model of this repository: uncached, with the policy that was tuned for it, with fewer steps and
# with other solvers. Options go to `cachepolicy demo`: `bash examples/demo.sh --policy pab --set spatial_every=3`.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck disable=SC1091
. .ci/venv
announce torchmetrics "torch, diffusers and what the demo uses" "1.3 GB" "about a minute"
install_torch
step "cachepolicy with its extra \`diffusers\`" -e ".[diffusers]"
cd "$here"
exec cachepolicy demo "$@"
