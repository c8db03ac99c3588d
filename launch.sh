#!/usr/bin/env bash
# Set up if needed, check the input, train.
#
#   bash launch.sh                                   the embedded tiny job: CPU, 4 processes
#   bash launch.sh CONFIG [key.path=value ...]       configs/CONFIG.yaml or a path, with overrides
#   bash launch.sh CONFIG --dry-run                  what would run where, and the memory it needs
#
# On several nodes start it on each with NNODES, NODE_RANK and MASTER_ADDR set (and MASTER_PORT, else 29500).
# NPROC_PER_NODE defaults to the ranks that the config asks for, divided by the nodes. Variables that you set
# stay as they are. tools/setup_env.sh tells which ones steer the set-up, docs/environment.md which ones a run is given.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/tools/setup_env.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
# The configuration is named by --config, wherever it stands, or by the first word.
config=tiny
words=()
given=0
while (($#)); do
  case $1 in
    --config=*) config=${1#*=}; given=$((given + 1)) ;;
    --config)
      (($# > 1)) || die "--config names no configuration; write --config CONFIG"
      config=$2; given=$((given + 1)); shift ;;
    -* | *=* | "") words+=("$1") ;;
    *) if ((${#words[@]} == 0 && given == 0)); then config=$1; given=1; else words+=("$1"); fi ;;
  esac
  shift
done
((given < 2)) || die "the configuration is named $given times, $config last; keep one"
set -- ${words[@]+"${words[@]}"}

export NNODES=${NNODES:-1}
# Pods of PyTorchJob and Volcano, and shells that were used for debugging, have rank variables of their own.
if [[ -n ${RANK:-}${WORLD_SIZE:-} ]]; then
  say "RANK=${RANK:-} and WORLD_SIZE=${WORLD_SIZE:-} are not mine and are ignored; for several nodes set NNODES," \
    "NODE_RANK and MASTER_ADDR"
fi
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK
for name in NNODES NPROC_PER_NODE; do
  [[ ${!name:-1} =~ ^[1-9][0-9]{0,5}$ ]] || die "$name=${!name} must be a number from 1 on"
done
nodes=" $(seq -s " " 0 $((NNODES - 1))) "
if ((NNODES > 1)) && [[ -z ${MASTER_ADDR:-} || $nodes != *" ${NODE_RANK:-none} "* ]]; then
  die "NNODES=$NNODES needs MASTER_ADDR (the first node's address) and NODE_RANK (0 to $((NNODES - 1)))"
fi

set_up
files=("$config" "$root/configs/$config" "$root/configs/$config.yaml")
for name in tiny tiny_moe tiny_mla; do
  if grep -qs "embedded:$name\b" - "${files[@]}" <<<"$*"; then make_tiny "$name"; fi
done

program=("$root/r1zero/main.py" --config "$config" "$@")
for argument in "$@"; do
  case $argument in
    --dry-run | --check | --print-world-size | -h | --help) exec "$python" "${program[@]}" ;;
  esac
done

where=()
if [[ -n ${NPROC_PER_NODE:-} ]]; then where+=(--nproc-per-node "$NPROC_PER_NODE"); fi
if ((NNODES > 1)); then
  where+=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
    --master-port "${MASTER_PORT:-29500}")
elif [[ -n ${MASTER_PORT:-} ]]; then
  where+=(--master-port "$MASTER_PORT")
fi
exec "$python" "$root/r1zero/node.py" ${where[@]+"${where[@]}"} "${program[@]}"
