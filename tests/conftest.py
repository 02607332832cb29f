"""What all tests share."""

import torch

# The tensors here are small, and OpenMP's threads spin while they wait for a core that another process has: on a busy
# machine two threads are several times slower than one.
torch.set_num_threads(1)
