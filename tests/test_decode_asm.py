"""The assembly that unpacks weights, over every pair of bytes and every group scale.

Dimension key: P pairs of bytes.
"""

import numpy as np
import pytest
import torch

from lowbit_kernels.formats.packing import to_levels
from lowbit_kernels.formats.weight import MAX_GROUP_SCALE
from lowbit_kernels.matmul.decode_asm import (
    half_asm,
    half_bias,
    int8_asm,
    level_bias,
    level_step,
)
from tests import ptx

# four packed bytes: every pair below, other bytes above
PAIRS = np.arange(2**16, dtype=np.int64)
WORDS = PAIRS | (PAIRS * 40503 & 0xFFFF) << 16
SLICES = [(bits, u) for bits in (1, 2, 4) for u in range(8 // bits)]


def expected_levels(words, bits, u):
    """Levels of the four bytes of each word, int64 [P, 4]."""
    codes = words[:, None] >> (8 * np.arange(4)) & 0xFF
    codes = codes if bits == 8 else codes >> (bits * u) & (2**bits - 1)
    return to_levels(torch.from_numpy(codes.astype(np.uint8)), bits).long()


def group_scales(bits):
    return range(1, MAX_GROUP_SCALE.get(bits, 1) + 1)


def doubled(value, dtype):
    """A number in both halves of a register."""
    bits = torch.tensor(value, dtype=dtype).view(torch.int16).item() & 0xFFFF
    return np.full(len(PAIRS), bits * 0x10001)


@pytest.mark.parametrize(("bits", "u"), [*SLICES, (8, 0)])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_pair_of_bytes_becomes_16_bit_numbers(bits, u, pairs, dtype):
    is_fp16 = dtype == torch.float16
    text = half_asm(bits, bits * u if bits < 8 else 0, is_fp16, pairs)
    for m in group_scales(bits):
        factor = doubled(float(m), dtype)
        offset = doubled(float(-m * half_bias(bits, is_fp16)), dtype)
        # the upper half of a 16-bit register is anything
        inputs = [WORDS] if pairs == 2 else [PAIRS | 0x5A5A0000]
        inputs += [factor] * pairs + [offset] * pairs
        out = ptx.run(text, {pairs + i: value for i, value in enumerate(inputs)})
        assert sorted(out) == list(range(pairs))
        numbers = np.concatenate([np.stack([out[i] & 0xFFFF, out[i] >> 16], -1) for i in out], -1)
        bits16 = torch.from_numpy(numbers.astype(np.uint16).view(np.int16))
        expected = m * expected_levels(WORDS, bits, u)[:, : 2 * pairs]
        assert torch.equal(bits16.view(dtype).double(), expected.double())


@pytest.mark.parametrize(("bits", "u"), SLICES)
def test_every_pair_of_bytes_becomes_int8(bits, u):
    text = int8_asm(bits, bits * u)
    for m in group_scales(bits):
        factor = np.full(len(PAIRS), m * level_step(bits))
        offset = np.full(len(PAIRS), (128 - m * level_bias(bits)) * 0x01010101)
        inputs = [WORDS, *[factor] * 4, *[offset] * 4]
        out = ptx.run(text, {1 + i: value for i, value in enumerate(inputs)})
        levels = (out[0][:, None] >> (8 * np.arange(4)) & 0xFF).astype(np.uint8).view(np.int8)
        expected = m * expected_levels(WORDS, bits, u)
        assert torch.equal(torch.from_numpy(levels).long(), expected)
