#!/usr/bin/env bash
# Run the tests that use transformers, with another version of it: bash tests/run_with_transformers.sh VERSION [pytest options]
#
# That version, and what it wants otherwise than .venv has it, go to .cache/transformers-VERSION; the rest is .venv's.
# The ends of the range that setup.cfg allows on NPUs are run so (docs/ascend.md).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../tools/setup_env.sh"

version=${1:?usage: bash tests/run_with_transformers.sh VERSION [pytest options]}; shift
tests=(tests/algo/test_algo.py tests/checkpoint tests/data tests/evaluation tests/models tests/policy/test_parity.py
  tests/policy/test_update.py tests/rollout/test_engine.py tests/rollout/test_engine_example.py
  tests/tools/test_convert_ckpt.py tests/weights tests/whole/test_cli.py)

# make_environment FOLDER: packages that are not in FOLDER are those of $python.
make_environment() {
  local packages
  packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -m venv "$1"
  echo "import site; site.addsitedir('$packages')" >"$("$1/bin/python" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
}

set_up test
environment=$root/.cache/transformers-$version
if [[ ! -x $environment/bin/python ]]; then make_environment "$environment"; fi
# pip also says what of .venv asks for another version; that is meant.
"$environment/bin/python" -m pip install -q --disable-pip-version-check "transformers==$version"
cd "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
"$environment/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
# The tiny model is made by this version, as its users have it: 4 does not read the tokenizer that 5 writes. Its weights
# are others, too, so it goes when the tests end.
trap 'rm -rf "$root/.cache/tiny"' EXIT
"$environment/bin/python" tools/make_tiny.py --force
# Left out: the doctor of a CPU tells that this is another version, as it should.
"$environment/bin/python" -m pytest -q "${tests[@]}" \
  --deselect tests/data/test_right_answers.py::test_check_and_doctor_print_it "$@"
