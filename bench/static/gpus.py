"""What one multiprocessor of each supported GPU can hold and do: nominal figures, none measured.

Sources. Resident warps, programs, registers and shared memory: CUDA C++ Programming Guide, table
"Technical Specifications per Compute Capability". Rates of ordinary instructions: its table
"Throughput of Native Arithmetic Instructions", with the split into pipes of Nsight Compute's
profiling guide and of NVIDIA's developer forum (threads 108729 and 302018). Matrix rates, clocks
and memory: NVIDIA's whitepapers and data sheets of the A100, L40S, H200, B200 and RTX PRO 6000,
AMD's of the MI300X. GeForce boards of sm_89 and sm_120 do half as much matrix work where sums are
fp32.
"""

from dataclasses import dataclass

KIB = 1024
SCHEDULERS = 4
WARP = 32
REGISTERS = 64 * KIB
# bytes that shared memory reads or writes in a cycle
SHARED_BYTES_PER_CYCLE = 128
# what the driver keeps of each program's shared memory, and the unit it is given out in
RESERVED_SHARED_BYTES, SHARED_UNIT = KIB, 128
# registers of a warp are given out in units of 256
REGISTER_UNIT = 256


@dataclass(frozen=True)
class Gpu:
    """One GPU, and how its architecture is compiled for.

    Args:
        arch: what Triton calls the architecture.
        name: of the board that the figures are for.
        num_sms: its multiprocessors.
        clock_hz: with which the matrix rate below gives the data sheet's.
        byte_per_s: memory bandwidth.
        flop_per_cycle: of 16-bit matrix operands on one multiprocessor, dense; twice in 8 bits,
            half in TF32.
        shared_bytes: shared memory of one multiprocessor.
        max_warps: resident on one.
        max_programs: resident on one.
        float_cycles: in which a scheduler's pipe takes an fp32 instruction of a warp.
        half_cycles: the same for packed fp16.
        bfloat_cycles: the same for packed bf16.
        warp_mma_share: of the matrix rate that ``mma.sync`` reaches (sm_90: Luo et al., arXiv
            2402.13499).
        spill_bytes: spilled bytes a thread that are tolerated.
    """

    arch: int | str
    name: str
    num_sms: int
    clock_hz: float
    byte_per_s: float
    flop_per_cycle: int
    shared_bytes: int = 228 * KIB
    max_warps: int = 64
    max_programs: int = 32
    float_cycles: int = 1
    half_cycles: int = 1
    bfloat_cycles: int = 1
    warp_mma_share: float = 1.0
    spill_bytes: int = 64

    @property
    def is_nvidia(self) -> bool:
        """Whether it runs CUDA."""
        return isinstance(self.arch, int)

    @property
    def program_shared_bytes(self) -> int:
        """Shared memory that one program may use."""
        return self.shared_bytes - (RESERVED_SHARED_BYTES if self.is_nvidia else 0)

    @property
    def flop_per_s(self) -> float:
        """Dense 16-bit matrix rate of the whole board."""
        return self.num_sms * self.clock_hz * self.flop_per_cycle


GPUS = {
    "sm_80": Gpu(
        80, "A100", 108, 1.41e9, 2.039e12, 2048, 164 * KIB, float_cycles=2, bfloat_cycles=2,
        spill_bytes=0,
    ),
    "sm_90": Gpu(90, "H200", 132, 1.83e9, 4.8e12, 4096, warp_mma_share=0.63, spill_bytes=0),
    "sm_89": Gpu(
        89, "L40S", 142, 2.52e9, 0.864e12, 1024, 100 * KIB, 48, 24, half_cycles=2, bfloat_cycles=2
    ),
    "sm_100": Gpu(100, "B200", 148, 1.85e9, 8.0e12, 8192),
    "sm_120": Gpu(
        120, "RTX PRO 6000", 188, 2.617e9, 1.792e12, 1024, 100 * KIB, 48, 24, half_cycles=2,
        bfloat_cycles=2,
    ),
    "gfx942": Gpu("gfx942", "MI300X", 304, 2.1e9, 5.3e12, 2048, 64 * KIB),
}  # fmt: skip


def occupancy(target: str, registers: int, num_warps: int, shared_bytes: int) -> tuple[int, str]:
    """Programs that one NVIDIA multiprocessor holds at once.

    Args:
        target: a name out of ``GPUS``.
        registers: of a thread.
        num_warps: of a program.
        shared_bytes: of a program.

    Returns:
        Their number, and what allows no more: ``"registers"``, ``"shared memory"``, ``"warps"`` or
        ``"programs"``.
    """
    gpu = GPUS[target]
    of_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    # each scheduler has a quarter of the registers
    warps = REGISTERS // SCHEDULERS // of_warp * SCHEDULERS
    shared = -(-(shared_bytes + RESERVED_SHARED_BYTES) // SHARED_UNIT) * SHARED_UNIT
    limits = {
        "warps": gpu.max_warps // num_warps,
        "programs": gpu.max_programs,
        "registers": warps // num_warps,
        "shared memory": gpu.shared_bytes // shared,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit
