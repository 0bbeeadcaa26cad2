"""The main loop of an NVIDIA kernel, read from its disassembly, and the bound that it implies.

The main loop is the innermost one with the most matrix work or, in a kernel without any, the
longest innermost one; a kernel without loops is taken whole. Both sides of a branch count, but for
the end of a tile, where programs stay for several: what a loop with matrix work writes to memory.

Cycles are those that one multiprocessor spends on one iteration of one program, each resource as if
the others cost nothing, so the largest is a lower bound whatever overlaps. Latencies, bank
conflicts and waits are not in them.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.static.control_flow import (
    CLASSES,
    Instruction,
    control_flow,
    innermost_loops,
    reachable,
)
from bench.static.gpus import GPUS, SCHEDULERS, SHARED_BYTES_PER_CYCLE, WARP, Gpu

# what the pipe of conversions and transcendental functions takes: 4 lanes a scheduler
_SPECIAL = re.compile(r"(MUFU|I2F|F2I|F2F|FRND|POPC|FLO|BREV)(?![A-Z0-9])")
_MULTIPLY = re.compile(r"IMAD|IDP")
_PACKED = re.compile(r"H(FMA|MUL|ADD)2")
_SINGLE = re.compile(r"F(FMA|MUL|ADD)|FH(FMA|ADD)")
_COMPARE = re.compile(r"(MOV|FSEL|FSETP|FMNMX)")
_WARP_SHAPES = {
    "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32),
    "16864": (16, 8, 64), "8816": (8, 8, 16),
}  # fmt: skip
WARP_GROUP = 4
# a step of K that the matrix units take at once is always 32 bytes long
K_BYTES = 32


@dataclass(frozen=True)
class MainLoop:
    """What one iteration of the main loop does.

    Args:
        is_loop: False for a kernel without loops, which is taken whole.
        matrix_loops: innermost loops with matrix instructions in the kernel.
        instructions: of a thread.
        mix: their number by class; classes without any are left out.
        matrix: the matrix instruction, None without any.
        flops: matrix work of a program: two operations a multiply-add.
        global_bytes: that a program moves from and to global memory, masks and repeats aside.
        cycles: that a multiprocessor spends on a program, by resource: ``tensor``, ``issue``,
            ``integer``, ``float``, ``special`` (conversions, exponentials), ``shared``, and
            ``memory`` where there is no matrix work, whose operands come from the L2 cache.
        peak_cycles: for the matrix work at its full rate or, without any, for the memory traffic.
    """

    is_loop: bool
    matrix_loops: int
    instructions: int
    mix: dict[str, int]
    matrix: str | None
    flops: int
    global_bytes: int
    cycles: dict[str, float]
    peak_cycles: float

    @property
    def bound(self) -> str:
        """The resource that needs the most cycles."""
        return max(self.cycles, key=lambda name: self.cycles[name])

    @property
    def best_share(self) -> float:
        """The most that the loop can reach of the matrix units' rate, or else of the memory's."""
        return self.peak_cycles / self.cycles[self.bound]


def analyze(disassembly: str, num_warps: int, target: str) -> MainLoop:
    """Find the main loop of a kernel and what bounds it.

    Args:
        disassembly: what ``nvdisasm -c`` prints.
        num_warps: of a program.
        target: ``"sm_90"`` and the like.
    """
    blocks = control_flow(disassembly)

    def body(loop: Iterable[int]) -> list[Instruction]:
        return [i for index in sorted(loop) for i in blocks[index].instructions]

    def work(loop: Iterable[int]) -> tuple[int, int]:
        return sum(_flops(i, num_warps) for i in body(loop)), len(body(loop))

    everything = reachable(blocks)
    loops = innermost_loops(blocks)
    matrix_loops = [loop for loop in loops if work(loop)[0]]
    if not matrix_loops and work(everything)[0]:
        # every step was unrolled, and what loops is something else
        loops = []
    found = max(matrix_loops or loops, key=work, default=None)
    if matrix_loops and found is not None:
        found = {i for i in found if not _writes(blocks[i].instructions)} or found
    instructions = body(everything if found is None else found)
    mix = Counter(i.kind for i in instructions)
    names = Counter(i.name for i in instructions if i.kind == "matrix")
    lanes = sum(_itemsize(i.name) for i in instructions if i.kind in ("global", "copy"))
    flops, moved = work(everything if found is None else found)[0], lanes * WARP * num_warps
    gpu = GPUS[target]
    cycles = _cycles(instructions, num_warps, gpu)
    peak = sum(_peak_cycles(i, num_warps, gpu) for i in instructions)
    if not flops:
        peak = cycles["memory"] = moved * gpu.clock_hz * gpu.num_sms / gpu.byte_per_s
    return MainLoop(
        is_loop=found is not None,
        matrix_loops=len(matrix_loops),
        instructions=len(instructions),
        mix={kind: mix[kind] for kind in (*CLASSES, "other") if mix[kind]},
        matrix=names.most_common(1)[0][0] if names else None,
        flops=flops,
        global_bytes=moved,
        cycles={name: round(count, 1) for name, count in cycles.items()},
        peak_cycles=round(peak, 1),
    )


def _cycles(body: Sequence[Instruction], num_warps: int, gpu: Gpu) -> dict[str, float]:
    # a scheduler issues one instruction a cycle; a pipe of 16 lanes takes a warp's in two
    special = [i for i in body if _SPECIAL.match(i.name)]
    multiply = sum(bool(_MULTIPLY.match(i.name)) for i in body)
    single = sum(bool(_SINGLE.match(i.name)) for i in body) * gpu.float_cycles
    packed = sum(
        gpu.bfloat_cycles if "BF16" in i.name else gpu.half_cycles
        for i in body
        if _PACKED.match(i.name)
    )
    integer = [
        i
        for i in body
        if i.kind in ("integer", "convert") or _COMPARE.match(i.name)
        if not (_SPECIAL.match(i.name) or _MULTIPLY.match(i.name))
    ]
    if gpu.float_cycles == 2:
        # one pipe for fp32 and integer products, another for packed halves
        floating = max(2 * multiply + single, packed)
    else:
        # two pipes, of which only one multiplies integers
        floating = max(2 * multiply + packed, multiply + single + packed)
    share = num_warps / SCHEDULERS
    return {
        "tensor": sum(_tensor_cycles(i, num_warps, gpu) for i in body),
        "issue": len(body) * share,
        "integer": 2 * len(integer) * share,
        "float": floating * share,
        "special": 8 * len(special) * share,
        "shared": sum(_shared_bytes(i, num_warps) for i in body) / SHARED_BYTES_PER_CYCLE,
    }


def _shape(instruction: Instruction) -> tuple[int, int, int]:
    """M, N and K of a matrix instruction."""
    if instruction.name.startswith("UTC"):
        bits = instruction.descriptor
        # PTX ISA, tcgen05 instruction descriptor: N / 8 from bit 17 on, M / 16 from bit 24
        return (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8, K_BYTES // _operand_bytes(instruction)
    for suffix in instruction.name.split(".")[1:]:
        if suffix in _WARP_SHAPES:
            return _WARP_SHAPES[suffix]
        if found := re.fullmatch(r"(\d+)x(\d+)x(\d+)", suffix):
            return int(found[1]), int(found[2]), int(found[3])
    raise ValueError(f"the shape of {instruction.name} is not known")


def _operand_bytes(instruction: Instruction) -> int:
    """Bytes an element of the operands."""
    if "TF32" in instruction.name:
        return 4
    return 2 if "HMMA" in instruction.name or "HGMMA" in instruction.name else 1


def _flops(instruction: Instruction, num_warps: int) -> int:
    """Matrix operations of all warps of a program."""
    if instruction.kind != "matrix":
        return 0
    M, N, K = _shape(instruction)
    return 2 * M * N * K * _copies(instruction, num_warps)


def _copies(instruction: Instruction, num_warps: int) -> int:
    """How often a program runs it: by warp, by group of four warps, or once."""
    if instruction.name.startswith("UTC"):
        return 1
    return num_warps // WARP_GROUP if "GMMA" in instruction.name else num_warps


def _peak_cycles(instruction: Instruction, num_warps: int, gpu: Gpu) -> float:
    """Of the matrix units at their full rate."""
    rate = gpu.flop_per_cycle * 2 / _operand_bytes(instruction)
    return _flops(instruction, num_warps) / rate


def _tensor_cycles(instruction: Instruction, num_warps: int, gpu: Gpu) -> float:
    is_warp_wide = not re.search(r"GMMA|UTC", instruction.name)
    share = gpu.warp_mma_share if is_warp_wide else 1.0
    return _peak_cycles(instruction, num_warps, gpu) / share


def _shared_bytes(instruction: Instruction, num_warps: int) -> int:
    """Bytes of shared memory that a program reads and writes by it."""
    name, kind = instruction.name, instruction.kind
    if kind == "matrix" and re.search(r"GMMA|UTC", name):
        # the right operand, and the left one unless it is in registers or tensor memory
        M, N, _ = _shape(instruction)
        operands = [o.strip() for o in instruction.operands.split(",")]
        left = operands[0] if name.startswith("UTC") else operands[1]
        rows = N + M if left.startswith("gdesc") else N
        return rows * K_BYTES * _copies(instruction, num_warps)
    if re.match(r"LDSM|STSM", name):
        found = re.search(r"88\.([24])", name)
        return WARP * 4 * (int(found[1]) if found else 1) * num_warps
    if re.match(r"LDS|STS|ATOMS|LDGSTS", name) and not instruction.operands.startswith("RZ, [RZ]"):
        # a narrow access takes a cycle, as one of four bytes a lane does
        return WARP * max(4, _itemsize(name)) * num_warps
    return 0


def _writes(instructions: Iterable[Instruction]) -> bool:
    return any(re.match(r"STG|UTMASTG", i.name) for i in instructions)


def _itemsize(name: str) -> int:
    """Bytes a lane of a load or store."""
    if found := re.search(r"\.([US]?)(8|16|64|128|256)(?=\.|$)", name):
        return int(found[2]) // 8
    return 4
