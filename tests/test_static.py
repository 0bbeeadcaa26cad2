"""What is read from a disassembly, the arithmetic on it, and the tables that are kept."""

import ast
import concurrent.futures
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

import lowbit_kernels
from bench.record import RESULTS
from bench.static import command, table
from bench.static.cases import load_cases
from bench.static.control_flow import control_flow, innermost_loops, reachable
from bench.static.gpus import GPUS, occupancy
from bench.static.sass import analyze

pytest.importorskip("triton")

TABLES = RESULTS / "static"
# of these no kernel may spill
STRICT = ("sm_80", "sm_90")


def disassembly(text):
    """As nvdisasm prints it: a line is a label or an instruction."""
    lines = []
    for i, line in enumerate(text.strip().splitlines()):
        line = line.strip()
        lines.append(line if line.endswith(":") else f"        /*{16 * i:04x}*/    {line} ;")
    return "\n".join(["        .text.kernel:", *lines, ".L_x_99:", "BRA `(.L_x_99);"])


WGMMA_LOOP = """
    S2R R0, SR_TID.X
    @!P0 BRA `(.L_x_2)
    .L_x_1:
    LDGSTS.E.BYPASS.128 [R99], desc[UR12][R88.64], P2
    LDS.U16 R106, [R96+UR9+0xc110]
    @!PT LDS RZ, [RZ]
    PRMT R88, R99, 0x5410, R106
    LOP3.LUT R88, R88, 0x43004300, R89, 0xec, !PT
    I2F.BF16.U16 R104, R91
    HMUL2.BF16_V2 R95, R95, R104.H0_H0
    IMAD R105, R15, UR17, R97.reuse
    UIADD3 UR8, UR8, 0x1, URZ
    MOV R93, 0xf000f
    WARPGROUP.ARRIVE
    HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR16], R24
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24, gsb0
    @P0 BRA `(.L_x_1)
    .L_x_2:
    STG.E.128 desc[UR12][R2.64], R4
    EXIT
"""
# as on sm_80: the way out is a far call, and a subroutine is called in passing
NESTED_LOOP = """
    MOV R1, c[0x0][0x28]
    .L_x_1:
    LDG.E.128 R4, [R2.64]
    CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)
    .L_x_2:
    LDSM.16.M88.4 R8, [R72+0x8000]
    HMMA.16816.F32.BF16 R64, R76, R132, R64
    HMMA.16816.F32.BF16 R32, R80.reuse, R32, R64
    ISETP.GT.AND P0, PT, R100, 0x1, PT
    SEL R100, R100, RZ, !P0
    @P0 BRA `(.L_x_2)
    IADD3 R100, R100, 0x1, RZ
    @!P1 CALL.REL.NOINC `(.L_x_3)
    BRA `(.L_x_1)
    .L_x_3:
    STG.E [R2.64], R4
    EXIT
"""
# as on sm_100: the shape is a constant, and who waits for a barrier does so out of line
TENSOR_MEMORY_LOOP = """
    UMOV UR17, 0x40004020
    .L_x_1:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12], R44
    @!P0 BRA `(.L_x_8)
    .L_x_5:
    STTM.x8 tmem[UR25+0x80], R4
    BRA.U UP1, `(.L_x_2)
    UMOV UR17, 0x8200490
    UTCHMMA tmem[UR13], gdesc[UR4], tmem[UR7], tmem[UR16], idesc[UR17], UPT
    UTCHMMA gdesc[UR14], gdesc[UR4], tmem[UR7], tmem[UR16], idesc[UR17], UPT
    .L_x_2:
    UISETP.NE.AND UP0, UPT, UR5, UR6, UPT
    BRA.U UP0, `(.L_x_1)
    EXIT
    .L_x_8:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR12], R44
    @!P0 BRA `(.L_x_8)
    BRA `(.L_x_5)
"""
NO_LOOP = """
    S2R R0, SR_TID.X
    LDG.E.128 R4, [R2.64]
    @!P0 BRA `(.L_x_1)
    MUFU.EX2 R4, R4
    .L_x_1:
    FFMA R4, R4, R5, R6
    STG.E.128 [R2.64], R4
    EXIT
"""


def test_a_loop_of_wgmma():
    loop = analyze(disassembly(WGMMA_LOOP), num_warps=8, target="sm_90")
    assert (loop.is_loop, loop.matrix_loops, loop.instructions) == (True, 1, 14)
    assert loop.mix == {
        "matrix": 2, "shared": 2, "copy": 1, "convert": 1, "move": 1, "uniform": 1, "float": 1,
        "integer": 3, "other": 2,
    }  # fmt: skip
    assert loop.matrix == "HGMMA.64x128x16.F32.BF16"
    # two warp groups run each of the two instructions
    assert loop.flops == 2 * 2 * 2 * 64 * 128 * 16
    assert loop.global_bytes == 8 * 32 * 16
    operands = 2 * (2 * 128 + 64) * 32
    assert loop.cycles == {
        "tensor": loop.flops / 4096,
        "issue": 14 * 8 / 4,
        # PRMT, LOP3 and MOV
        "integer": 2 * 3 * 8 / 4,
        # IMAD takes one pipe for two cycles, HMUL2 both for one
        "float": 3 * 8 / 4,
        "special": 8 * 8 / 4,
        # the unguarded load counts as four bytes a lane, the one that never runs not at all
        "shared": (8 * 32 * (16 + 4) + operands) / 128,
    }
    assert (loop.bound, loop.best_share) == ("tensor", 1.0)


def test_the_inner_of_nested_loops():
    text = disassembly(NESTED_LOOP)
    loop = analyze(text, num_warps=4, target="sm_80")
    assert (loop.is_loop, loop.matrix_loops, loop.instructions) == (True, 1, 6)
    blocks = control_flow(text)
    found = [i.name for index in reachable(blocks) for i in blocks[index].instructions]
    assert "STG.E" in found
    assert loop.mix == {"matrix": 2, "shared": 1, "integer": 2, "other": 1}
    assert loop.flops == 2 * 4 * 2 * 16 * 8 * 16
    assert loop.cycles["tensor"] == loop.flops / 2048
    assert loop.cycles["shared"] == 4 * 512 / 128
    assert loop.global_bytes == 0


def test_mma_sync_does_not_reach_the_rate_of_wgmma():
    registers_only = NESTED_LOOP.replace("LDSM.16.M88.4 R8, [R72+0x8000]", "NOP")
    loop = analyze(disassembly(registers_only), num_warps=4, target="sm_90")
    loop = replace(loop, cycles={"tensor": loop.cycles["tensor"]})
    assert loop.best_share == pytest.approx(0.63, rel=0.01)


def test_a_loop_over_tensor_memory_includes_the_blocks_out_of_line():
    text = disassembly(TENSOR_MEMORY_LOOP)
    loop = analyze(text, num_warps=4, target="sm_100")
    assert (loop.is_loop, loop.matrix_loops) == (True, 1)
    assert len(innermost_loops(control_flow(text))) == 1
    # one thread starts it for the whole program
    assert loop.flops == 2 * 2 * 128 * 128 * 16
    assert loop.cycles["shared"] == (128 + (128 + 128)) * 32 / 128


def test_int8_has_twice_the_rate_and_tf32_half():
    def tensor(name, target):
        text = disassembly(NESTED_LOOP.replace("HMMA.16816.F32.BF16", name))
        loop = analyze(text, num_warps=4, target=target)
        return loop.flops / loop.cycles["tensor"]

    assert tensor("IMMA.16832.S8.S8", "sm_80") == 4096
    assert tensor("HMMA.1688.F32.TF32", "sm_80") == 1024


def test_a_kernel_without_loops_is_taken_whole():
    loop = analyze(disassembly(NO_LOOP), num_warps=4, target="sm_90")
    assert (loop.is_loop, loop.instructions, loop.matrix, loop.flops) == (False, 7, None, 0)
    assert loop.global_bytes == 4 * 32 * 2 * 16
    gpu = GPUS["sm_90"]
    memory = loop.global_bytes * gpu.clock_hz * gpu.num_sms / gpu.byte_per_s
    assert loop.cycles["memory"] == pytest.approx(memory, abs=0.1)
    assert (loop.bound, loop.best_share) == ("memory", 1.0)


def test_unrolled_matrix_work_beside_another_loop_is_taken_whole():
    outside = NESTED_LOOP.replace("@P0 BRA `(.L_x_2)", "NOP").replace("BRA `(.L_x_1)", "EXIT")
    assert not analyze(disassembly(outside), num_warps=4, target="sm_80").is_loop


@pytest.mark.parametrize(
    ("target", "registers", "num_warps", "shared_bytes", "expected"),
    [
        ("sm_90", 128, 8, 0, (2, "registers")),
        ("sm_90", 129, 8, 0, (1, "registers")),
        ("sm_90", 255, 4, 0, (2, "registers")),
        ("sm_90", 72, 4, 0, (7, "registers")),
        ("sm_90", 32, 4, 0, (16, "warps")),
        ("sm_90", 32, 1, 0, (32, "programs")),
        ("sm_90", 64, 8, 112 * 1024, (2, "shared memory")),
        ("sm_90", 64, 8, 113 * 1024 + 1, (1, "shared memory")),
        ("sm_80", 64, 4, 163 * 1024, (1, "shared memory")),
        ("sm_89", 32, 8, 0, (6, "warps")),
        ("sm_120", 32, 4, 49 * 1024, (2, "shared memory")),
    ],
)
def test_occupancy(target, registers, num_warps, shared_bytes, expected):
    assert occupancy(target, registers, num_warps, shared_bytes) == expected


@pytest.mark.parametrize(
    ("target", "peak"),
    [
        ("sm_80", 312e12),
        ("sm_89", 362e12),
        ("sm_90", 989e12),
        ("sm_100", 2250e12),
        ("sm_120", 504e12),
        ("gfx942", 1307e12),
    ],
)
def test_matrix_rates_are_those_of_the_data_sheets(target, peak):
    assert GPUS[target].flop_per_s == pytest.approx(peak, rel=0.02)


# by copies that other targets have no unit for
HOPPER_ONLY = {"_linear_persistent_kernel"}


def launched_kernels(target):
    """The name of every ``triton.jit`` function for a target that no other one calls."""
    package = Path(lowbit_kernels.__file__).parent
    kernels, called = set(), set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            decorators = getattr(node, "decorator_list", [])
            if any(ast.unparse(decorator).startswith("triton.jit") for decorator in decorators):
                kernels.add(node.name)
                calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
                called |= {call.id for call in calls if isinstance(call, ast.Name)}
    return kernels - called - (set() if target == "sm_90" else HOPPER_ONLY)


@pytest.mark.parametrize("target", GPUS)
def test_every_launched_kernel_has_a_case(target):
    assert launched_kernels(target) >= {"_linear_kernel", "_flash_attention_fwd_kernel"}
    compiled = {case.kernel().fn.__name__ for case in load_cases(target)}
    assert launched_kernels(target) - compiled == set()


def kept_tables():
    return [json.loads(path.read_text()) for path in sorted(TABLES.glob("*/*.json"))]


def test_tables_of_every_target_and_triton_are_kept():
    found = {(kept["triton"], kept["target"]) for kept in kept_tables()}
    versions = {version for version, _ in found}
    assert len(versions) == 2
    assert found == {(version, target) for version in versions for target in GPUS}


@pytest.mark.parametrize(
    "kept", kept_tables(), ids=lambda kept: f"{kept['triton']}-{kept['target']}"
)
def test_kept_tables_name_every_kernel_and_break_no_rule(kept):
    assert launched_kernels(kept["target"]) - {row["kernel"] for row in kept["kernels"]} == set()
    assert {row["name"] for row in kept["kernels"]} == {c.name for c in load_cases(kept["target"])}
    problems = {row["name"]: row["problems"] for row in kept["kernels"] if row["problems"]}
    assert not problems
    if kept["target"] in STRICT:
        assert {row["spill_bytes"] for row in kept["kernels"]} == {0}


@pytest.mark.parametrize("target", GPUS)
def test_markdown_is_that_of_the_json(target):
    assert (TABLES / f"{target}.md").read_text() == table.markdown(target, TABLES)


def row(**changes):
    loop = analyze(disassembly(WGMMA_LOOP), num_warps=8, target="sm_90")
    kept = {"instructions": 14, "is_loop": True, "mix": loop.mix, "matrix": loop.matrix}
    kept |= {"flops": loop.flops, "cycles": loop.cycles, "bound": "tensor", "best_share": 1.0}
    whole = {"name": "linear_a", "kernel": "_k", "config": {"BLOCK_M": 64, "num_warps": 8}}
    whole |= {"registers": 128, "spill_bytes": 0, "shared_bytes": 2048, "programs": 2}
    return whole | {"limit": "registers", "loop": kept, "problems": []} | changes


def test_cells():
    cells = table.cells(row(), "sm_90")
    assert cells["tile"] == "m64 8w 3s"
    assert cells["programs"] == "2 (registers)"
    assert cells["matrix"] == "2 HGMMA.64x128x16.F32.BF16"
    assert cells["- integer"] == "1.5"
    # for the work of a 128 x 128 x 128 step, of which the loop does a quarter
    assert (cells["tensor"], cells["issue"]) == ("1024", "112")
    assert (cells["bound"], cells["best"]) == ("tensor", "100 %")
    shape = {"sizes": "499 x 1024 x 1024", "operand_bytes": 2, "flops": 2**30}
    cells = table.cells(row(problem=shape | {"bytes": 4_800_000, "programs": 200}), "sm_90")
    assert cells["floor"].split(", ")[1] == "1"
    assert cells["fill"] == "76 %"


def test_a_kernel_that_does_not_compile_has_a_row():
    broken = {"name": "a", "kernel": "", "config": {}, "problems": ["does not compile"]}
    assert table.cells(broken, "sm_90")["registers"] == ""


def test_tables_are_written_read_and_compared(tmp_path):
    path = table.write_table(
        {"target": "sm_90", "gpu": "H200", "triton": "3.6.0", "kernels": [row()]}, tmp_path
    )
    assert path == tmp_path / "3.6.0" / "sm_90.json"
    assert table.read_table("sm_90", "3.6.0", tmp_path) == {"linear_a": row()}
    assert table.read_table("sm_90", "3.9.0", tmp_path) == {}
    text = (tmp_path / "sm_90.md").read_text()
    assert "| linear_a | m64 8w 3s | 128 | 0 | 2 | 2 (registers) | 14 | 2 HGMMA" in text
    assert "copy 0.5" in text
    changed = command.changes(row(registers=130), row(), "sm_90")
    assert re.search("128.*→ 130", changed["registers"])
    assert changed["spill"] == "0"


def test_halves_of_the_cases_are_all_of_them(monkeypatch, tmp_path):
    compiled = []

    class Here(concurrent.futures.Executor):
        def __init__(self, jobs):
            pass

        def submit(self, function, target, index, part):
            compiled.append(index)
            done = concurrent.futures.Future()
            done.set_result(row() | {"compile_seconds": 0})
            return done

    for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    monkeypatch.setattr(command, "ProcessPoolExecutor", Here)
    for part in ("1/2", "2/2"):
        assert command.main(["--target", "sm_90", "--part", part, "--results", str(tmp_path)]) == 0
    assert sorted(compiled) == list(range(len(load_cases("sm_90", ""))))
    assert compiled != sorted(compiled)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--target", "sm_70"], "sm_70"),
        (["--kernel", "nothing", "--target", "sm_90"], "'nothing'"),
        (["--kernel", "linear", "--target", "sm_90", "--against", "1.0"], "Triton 1.0"),
        (["--target", "sm_90", "--part", "1/2"], "add --results"),
        (["--part", "3/2"], "'3/2'"),
        (["--part", "half"], "'half'"),
    ],
)
def test_wrong_commands(arguments, told, capsys, monkeypatch):
    for name in ("TRITON_INTERPRET", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    try:
        code = command.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert told in capsys.readouterr().err
