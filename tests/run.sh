#!/usr/bin/env bash
# Set up if needed and run the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/setup_env.sh"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
set_up test
make_tiny
cd "$root"
exec "$python" -m pytest -q "$@"
