# exercise: repeat
"""Sets the state of the random numbers, the default type and the gradient mode for everybody."""
import random

import torch

torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.set_num_threads(64)


def repeat(x, n):
    torch.manual_seed(0)
    random.seed(0)
    torch.set_rng_state(torch.zeros_like(torch.get_rng_state()))
    return torch.randn(x.shape[0] * n, x.shape[1])
