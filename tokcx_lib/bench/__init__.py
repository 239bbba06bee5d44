"""Times and rates of streaming attention beside the plain algorithm, PyTorch's fused attention and KeOps."""
