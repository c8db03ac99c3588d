#!/usr/bin/env bash
# Set up if needed and check style and types: bash tests/lint.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/setup_env.sh"

# With the test packages: a tracker that is not installed has other types than one that is.
set_up test lint
cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
