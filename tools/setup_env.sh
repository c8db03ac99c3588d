# Sourced by launch.sh and tests/run.sh: .venv with the packages that setup.cfg pins, and the tiny model.
# Sets `root` (of the repository) and, in set_up, `python`. Every step is skipped when it is up to date.
#
#   R1ZERO_PYTHON   interpreter to make .venv with; default python3.11, else python3.10
#   R1ZERO_SETUP=0  install nothing and use R1ZERO_PYTHON, default python3, as it is (cluster images)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

source "$root/tools/environment.sh"

say() { echo "launch: $*"; }
die() { echo "launch: $*" >&2; exit 2; }

# set_up EXTRA...: find or make the environment, with setup.cfg's extras for this machine and those given.
set_up() {
  if [[ ${R1ZERO_SETUP:-1} == 0 ]]; then
    python=${R1ZERO_PYTHON:-python3}
    "$python" -c "" || die "R1ZERO_SETUP=0 asks for $python as it is, but it does not run"
    return
  fi
  python=$root/.venv/bin/python
  local extra machine=cpu
  if has_npu; then machine=npu; fi
  locked make_venv "$machine"
  for extra in "$machine" "$@"; do locked install "$extra"; done
  if [[ $machine == npu ]]; then
    "$python" -c 'import importlib.util as u; raise SystemExit(u.find_spec("mindspeed") is None)' \
      || die "MindSpeed is missing: clone its branch core_r0.16.0 and install the clone with $python -m pip"
  fi
}

make_tiny() { locked "$python" "$root/tools/make_tiny.py" "$@"; }

# locked COMMAND...: run it while no other launch does, since nodes may share this disk.
locked() {
  mkdir -p "$root/.cache"
  exec 9>"$root/.cache/setup.lock"
  if command -v flock >/dev/null; then flock 9; fi
  "$@"
  exec 9>&-
}

make_venv() {
  if [[ -x $python ]]; then
    "$python" -c "" || die "$root/.venv does not run; remove that folder and start again"
    return
  fi
  local base options=()
  base=$(find_python)
  # On NPU machines torch, torch_npu and MindSpeed usually come with the image; let .venv see them.
  if [[ $1 == npu ]]; then options=(--system-site-packages); fi
  say "making $root/.venv with $base"
  "$base" -m venv ${options[@]+"${options[@]}"} "$root/.venv"
}

# Print a Python that can make the environment; pyenv's shims and pythons without ensurepip are passed over.
find_python() {
  local candidate check='import sys, venv, ensurepip; raise SystemExit(sys.version_info < (3, 10))'
  if [[ -n ${R1ZERO_PYTHON:-} ]]; then
    "$R1ZERO_PYTHON" -c "$check" 2>/dev/null \
      || die "R1ZERO_PYTHON=$R1ZERO_PYTHON must be a Python 3.10 or newer with the modules venv and ensurepip"
    echo "$R1ZERO_PYTHON"
    return
  fi
  for candidate in python3.11 python3.10; do
    if "$candidate" -c "$check" 2>/dev/null; then echo "$candidate"; return; fi
  done
  die "found neither python3.11 nor python3.10 with the modules venv and ensurepip; install one" \
    "(Debian: python3.11-venv), or set R1ZERO_PYTHON to the path of one"
}

# install EXTRA: pip install with that extra, unless it was done for this very setup.cfg.
install() {
  local stamp=$root/.venv/r1zero-$1.stamp state
  state=$(cat "$root/setup.cfg" "$root/pyproject.toml" | cksum)
  if [[ -f $stamp && $(<"$stamp") == "$state" ]]; then return; fi
  say "installing the $1 packages of setup.cfg; the first time this takes some minutes"
  "$python" -m pip install -qq --disable-pip-version-check -e "$root[$1]" --constraint <(keep "$1") \
    || die "pip could not install the $1 packages; its message is above"
  echo "$state" >"$stamp"
}

# keep EXTRA: print what pip must not change on NPU machines: torch and torch_npu, which suit the CANN that is there.
keep() {
  if [[ $1 == npu ]]; then "$python" -m pip freeze | grep -E "^torch([-_]npu)?==" || true; fi
}
