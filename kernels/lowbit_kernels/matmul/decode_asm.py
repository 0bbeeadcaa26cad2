"""PTX that unpacks weights, as text for ``tl.inline_asm_elementwise``.

A kernel of plain Triton issues about as many instructions to unpack a tile as the matrix unit has
cycles of work on it; this text needs 1.5 a 4-bit weight for 16-bit inputs, 0.9 for int8.

For 16-bit inputs two neighboring bytes become one register of two numbers: ``prmt`` spreads them,
``lop3`` puts the code into the lowest bits of 1024 (fp16) or 128 (bf16), and one fused
multiply-add takes the offset away and applies the group scale, exactly, as every product is an
integer of at most 128. ``wgmma`` wants two bytes a thread (``PAIRS = 1``), ``mma.sync`` four.

For int8 inputs four bytes stay in one register. With levels ``a * code - b`` and group scale m,
``code * a * m + 128 - b * m`` is between 0 and 255 in each byte, so one 32-bit multiply-add serves
four weights, and an ``xor`` with 128 makes them signed.
"""

import triton


@triton.constexpr_function
def level_step(bits: int) -> int:
    """The a of ``level = a * code - b``."""
    return 1 if bits == 4 else 2


@triton.constexpr_function
def level_bias(bits: int) -> int:
    """The b of ``level = a * code - b``."""
    return {4: 8, 2: 3, 1: 1}[bits]


@triton.constexpr_function
def half_bias(bits: int, is_fp16: bool) -> int:
    """What ``half_asm`` wants times the group scale, with a minus, as its offset."""
    return (1032 if is_fp16 else 136) if bits == 4 else 1


@triton.constexpr_function
def int8_asm(bits: int, shift: int) -> str:
    """Four levels times their group scale.

    Operands: $0 four int8; $1 four packed bytes; $2 ``a * m``; $6 ``128 - b * m`` in every byte.
    """
    mask = (2**bits - 1) * 0x01010101
    text: str = _block(
        f"shr.u32 t, $1, {shift};",
        f"and.b32 t, t, {mask:#010x};",
        "mad.lo.u32 t, t, $2, $6;",
        "xor.b32 $0, t, 0x80808080;",
    )
    return text


@triton.constexpr_function
def half_asm(bits: int, shift: int, is_fp16: bool, pairs: int) -> str:
    """Two (``pairs = 1``) or four levels times their group scale, as fp16 or bf16.

    Operands: outputs; packed bytes; ``pairs`` registers of the factor, then as many of the offset.
    With h the number that holds the code, the result is ``h * factor + offset`` at 4 bits,
    ``(h - 1027 or 131) * factor`` at 2, the factor with the sign of the code at 1. At 8 bits
    neither is used.
    """
    lines = ["cvt.u32.u16 q, $1;"] if pairs == 1 else ["mov.b32 q, $2;"]
    for i in range(pairs):
        lines.append(f"prmt.b32 t, q, 0, {('0x4140', '0x4342')[i]};")
        lines += _two(bits, shift, is_fp16, f"${i}", f"${pairs + 1 + i}", f"${2 * pairs + 1 + i}")
    text: str = _block(*lines)
    return text


@triton.constexpr_function
def _two(bits: int, shift: int, is_fp16: bool, out: str, factor: str, offset: str) -> list[str]:
    """Instructions from t, a byte in each half, to ``out``."""
    # the number that a code is put into, one, and minus zero
    kind, base, unit = ("f16x2", 0x6400, 0x3C00) if is_fp16 else ("bf16x2", 0x4300, 0x3F80)
    zero = 0x8000

    def fma(out: str, a: str, b: int | str, c: int | str) -> list[str]:
        b, c = (x if isinstance(x, str) else f"{x * 0x10001:#x}" for x in (b, c))
        return [f"mov.b32 f, {b};", f"mov.b32 g, {c};", f"fma.rn.{kind} {out}, {a}, f, g;"]

    def put(target: str, mask: int) -> str:
        return f"lop3.b32 {target}, t, {mask * 0x10001:#x}, {base * 0x10001:#x}, 0xea;"

    if bits == 8 and is_fp16:
        # 1024 + (level + 128)
        return ["xor.b32 t, t, 0x64806480;", *fma(out, "t", unit, 0xE480)]
    if bits == 8:
        # the low seven bits on top of 128, and 128 or, where the sign bit is set, 256
        return [put("h", 0x7F), put("t", 0x80), *fma(out, "t", 0x8000 | unit, "h")]
    if bits == 4:
        return [f"shr.u32 t, t, {shift};", put("t", 0xF), *fma(out, "t", factor, offset)]
    if bits == 2:
        # twice the code lies one bit higher
        move = f"shr.u32 t, t, {shift - 1};" if shift else "shl.b32 t, t, 1;"
        minus = 0x8000 | base | 3
        return [move, put("t", 6), *fma("t", "t", unit, minus), *fma(out, "t", factor, zero)]
    # the code, inverted, is the sign
    return [f"shl.b32 t, t, {15 - shift};", f"lop3.b32 {out}, t, 0x80008000, {offset}, 0x6a;"]


@triton.constexpr_function
def _block(*lines: str) -> str:
    return "\n".join(["{", ".reg .b32 q, t, h, f, g;", *lines, "}"])


@triton.constexpr_function
def half_constraints(pairs: int) -> str:
    """Of ``half_asm``: a pair of bytes is a 16-bit register."""
    return "=r,h,r,r" if pairs == 1 else "=r,=r,r,r,r,r,r"
