"""One thread a process: several ranks share the cores, and a forked child cannot inherit a thread pool."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402 - the variables must be set first

torch.set_num_threads(1)
