"""What a CUDA graph does, on a CPU."""

import torch

from lowbit_kernels.conversion.graphs import _capture_all


def recapture(call, pool):
    """Run again and write into the same output tensors."""
    output = call()

    def replay():
        overwrite(output, call())

    return replay, output, pool


def overwrite(old, new):
    if isinstance(old, torch.Tensor):
        old.copy_(new)
        return
    for key in old if isinstance(old, dict) else range(len(old)):
        overwrite(old[key], new[key])


def capture_on_cpu(model, samples, batch, capture=recapture):
    """As ``capture_graphs``, with lengths in samples."""
    return _capture_all(model, {(b, t) for b in batch for t in samples}, capture)
