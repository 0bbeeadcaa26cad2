"""training_conv1d: what it refuses."""

import pytest
import torch

from lowbit_kernels.conv1d import training_conv1d
from lowbit_kernels.fake_quant import Levels, Quantizer

W4 = Levels.of_weight(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epilogue": "tanh"}, "epilogue must be one of .* got 'tanh'"),
        ({"weight": torch.ones(6, 8)}, r"weight must be \[N, C / groups, taps\] and not empty"),
        ({"weight": torch.ones(0, 8, 3)}, r"weight must be \[N, C / groups, taps\] and not empty"),
        (
            {"weight": torch.ones(6, 4, 4)},
            r"x must have groups \* 4 channels .* got 8 channels in 1",
        ),
        ({"weight": torch.ones(6, 4, 3)}, "x has 8 channels in 1 groups"),
        ({"weight": torch.ones(7, 8, 3), "epilogue": "glu"}, "even number of rows, got N = 7"),
        ({"x": torch.ones(2, 8, 2)}, "x must have at least 3 frames"),
        ({"x": torch.ones(2, 8, 5).long()}, "x must be fp16, bf16 or fp32"),
        ({"bias": torch.ones(5)}, r"bias must be \[6\], got \[5\]"),
        ({"residual": torch.ones(2, 6, 3).half()}, "residual must be torch.float32 on cpu like x"),
        ({"lengths": torch.ones(3).long()}, r"lengths must be \[2\]"),
        ({"quantizer": Quantizer(W4)}, "scale must be given for a weight"),
        ({"quantizer": Quantizer(W4, torch.ones(4))}, r"scale must have 1 element or shape \(6,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.ones(2, 8, 5), "weight": torch.ones(6, 8, 3)} | change
    with pytest.raises(ValueError, match=message):
        training_conv1d(**arguments)
