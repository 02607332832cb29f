"""What all tests share."""

import torch
from hypothesis import settings

# No test asserts a time, and a busy machine can take any for one example.
settings.register_profile("torchrec_lma", deadline=None)
settings.load_profile("torchrec_lma")

# The tensors here are small, and OpenMP's threads spin while they wait for a core that another process has: on a busy
# machine two threads are several times slower than one.
torch.set_num_threads(1)
