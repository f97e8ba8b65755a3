"""The mark of the blocks that a model stacks."""

from torch import nn


class StackedBlock(nn.Module):
    """A block of a model's residual stack, called as `block(x, ...)` with x its residual input.

    Training treats these blocks one by one: it recomputes them, shards them, scales their gradients in float16, and
    gives their matrices to Muon. They do not contain one another.
    """
