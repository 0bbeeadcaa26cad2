"""The one tolerance rule: a kernel may err at most twice as much as PyTorch does."""

import torch
from torch import Tensor


def assert_as_accurate(actual: Tensor, low: Tensor, high: Tensor, name: str = "out") -> None:
    """Assert that a result errs at most twice as much as PyTorch does in the same dtype.

    Args:
        actual: what the kernel returned.
        low: the reference, computed in the dtype of ``actual``.
        high: the reference, computed in fp64.
        name: the tensor's name in the message.

    Raises:
        AssertionError: on a wrong shape or dtype, a NaN or infinity that the reference does not
            have, or an error above the budget.
    """
    torch.testing.assert_close(actual, low, rtol=0.0, atol=torch.inf, equal_nan=False)
    if actual.numel() == 0:
        return
    error = (actual.double() - high).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * high.abs().max().item()
    budget = 2 * ((low.double() - high).abs().max().item() + rounding)
    # written so that a NaN fails
    assert error <= budget, f"{name}: max error {error:.2e}, allowed {budget:.2e}"
