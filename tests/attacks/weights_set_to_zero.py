# exercise: Scale
"""A module that sets its parameter to zero while it runs."""
import torch
from torch import nn


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        with torch.no_grad():
            self.factor.zero_()
            x.zero_()
        return torch.zeros_like(x) + 0 * self.factor
