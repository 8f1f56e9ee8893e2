"""A module with a parameter of another shape name, a submodule, a buffer that counts, and methods of its own."""


def submission(toy):
    answers = dict(toy.SOLUTIONS)
    answers["Scale"] = '''class Inner(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_parameter("g", nn.Parameter(torch.full((width,), 1.0)))

    def forward(self, x):
        return torch.einsum("...d,d->...d", x, self.g)


class Scale(nn.Module):
    """Scale."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(Inner(width), nn.Identity())
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def extra_repr(self):
        return "mine"

    def forward(self, x):
        self.calls += 1
        return self.inner(x)'''
    return toy.filled(answers)
