#!/usr/bin/env bash
# Set up if needed and run the tests: bash tests/run.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/setup_env.sh"

# The report is tested in a real browser. Without one its tests fail and say what to install.
get_chromium() {
  local name
  for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then return; fi
  done
  if ((EUID)) || ! command -v apt-get >/dev/null; then return; fi
  say "installing the package chromium, for the tests of the report"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } >/dev/null \
    || say "apt-get could not install chromium; its message is above"
}

set_up test
locked get_chromium
make_tiny
cd "$root"
# All tests are shared by two processes, since most use one core; as many tests for each as it has time for.
if (($# == 0)); then set -- -n logical --maxprocesses 2 --dist worksteal; fi
exec "$python" -m pytest -q --durations=15 "$@"
