# Sourced by tools/setup_env.sh and tools/slurm.sbatch: variables that must be there before Python starts. A value that
# you set stays. Those of NPUs that each rank can set for itself are in r1zero/distributed/npu_environment.py;
# docs/environment.md explains all.
#
#   R1ZERO_JEMALLOC   0: preload no jemalloc; a path: preload that file; default: on NPU machines, if it is installed

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # ranks share the cores; more threads than cores slow all down
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}  # Megatron's sequence parallelism asks for it

has_npu() { command -v npu-smi >/dev/null || compgen -G "/dev/davinci[0-9]*" >/dev/null; }

# Print the path of jemalloc, or nothing.
find_jemalloc() {
  if [[ -n ${R1ZERO_JEMALLOC:-} ]]; then
    echo "$R1ZERO_JEMALLOC"
  elif has_npu; then
    { PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null || true; } \
      | awk '$1 == "libjemalloc.so.2" && !found++ { print $NF }'
  fi
}

preload_jemalloc() {
  # another allocator, or this one already
  if [[ ${LD_PRELOAD:-} =~ lib[a-z]*malloc[a-z_]*\.so ]]; then return; fi
  local file
  file=$(find_jemalloc)
  if [[ -z $file || $file == 0 ]]; then return; fi
  if [[ ! -r $file ]]; then
    echo "R1ZERO_JEMALLOC=$file is not there; name the file libjemalloc.so.2, or set 0 to do without" >&2
    exit 2
  fi
  export LD_PRELOAD=$file${LD_PRELOAD:+:$LD_PRELOAD}
}

preload_jemalloc
