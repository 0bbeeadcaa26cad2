"""Runs straight-line PTX on many threads at once: the instructions of our inline assembly, exactly.

A register holds one int64 value a thread, of which the low 32 bits count.
"""

import re

import numpy as np
import torch

MASK = 0xFFFFFFFF


def run(text, operands):
    """Run a block of PTX.

    Args:
        text: as given to ``tl.inline_asm_elementwise``.
        operands: number to values [threads], int64, of the inputs.

    Returns:
        number to values, int64, of every operand that was written.
    """
    registers = {f"${i}": np.asarray(v, dtype=np.int64) & MASK for i, v in operands.items()}
    threads = len(next(iter(registers.values())))
    for line in text.strip().removeprefix("{").removesuffix("}").strip().splitlines():
        name, *arguments = re.findall(r"[^\s,;]+", line)
        if name == ".reg":
            continue
        values = [_read(argument, registers, threads) for argument in arguments[1:]]
        registers[arguments[0]] = INSTRUCTIONS[name](*values) & MASK
    return {
        int(k[1:]): v for k, v in registers.items() if k[0] == "$" and int(k[1:]) not in operands
    }


def _read(argument, registers, threads):
    if argument in registers:
        return registers[argument]
    return np.full(threads, int(argument, 0), dtype=np.int64)


def _prmt(a, b, selector):
    both, result = a | b << 32, 0
    for i in range(4):
        chosen = selector >> (4 * i) & 7
        assert not (selector >> (4 * i) & 8).any(), "sign replication is not emulated"
        result = result | (both >> (8 * chosen) & 0xFF) << (8 * i)
    return result


def _lop3(a, b, c, table):
    result = np.zeros_like(a)
    for i in range(8):
        # bit i of the table is the result where a, b, c have the bits of i
        picked = MASK * np.ones_like(a)
        for value, bit in ((a, i >> 2 & 1), (b, i >> 1 & 1), (c, i & 1)):
            picked &= value if bit else ~value
        result |= np.where(table >> i & 1, picked, 0)
    return result


def _halves(register, dtype):
    halves = np.stack([register & 0xFFFF, register >> 16], -1).astype(np.uint16).view(np.int16)
    return torch.from_numpy(halves).view(dtype).double()


def _fma(dtype):
    def fma(a, b, c):
        # the product of two 16-bit numbers, and the sums of our range, are exact in fp64
        a, b, c = (_halves(value, dtype) for value in (a, b, c))
        bits = (a * b + c).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.int64)
        return bits[:, 0] | bits[:, 1] << 16

    return fma


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "cvt.u32.u16": lambda a: a & 0xFFFF,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "fma.rn.f16x2": _fma(torch.float16),
    "fma.rn.bf16x2": _fma(torch.bfloat16),
}
