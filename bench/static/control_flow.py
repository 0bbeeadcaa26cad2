"""Control flow of an NVIDIA kernel's disassembly: instructions, blocks, loops."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# what an instruction does, by the first pattern that its name matches
CLASSES = {
    "matrix": r"[HIQO]G?MMA|UTC[HIQO]MMA",
    "shared": r"LDSM?|STSM?|ATOMS|LDTM|STTM",
    "copy": r"LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLKCP",
    "global": r"LDG?|STG?|REDG?|ATOMG?",
    "spill": r"LDL|STL",
    "convert": r"I2FP?|F2IP?|F2FP?|I2IP?|FRND",
    "move": r"MOV|IMAD\.MOV|CS2R|S2U?R|R2UR|LDCU?|ULDC|UMOV",
    "uniform": r"U\w+",
    "float": r"[FH](FMA|MUL|ADD|SETP?|SEL|MNMX)\d?|FH(ADD|FMA)|FCHK|MUFU",
    "shuffle": r"SHFL|C?REDUX|VOTE|MATCH",
    "integer": r"I\w+|VI\w+|LOP3?|PLOP3|SHF|SHL|SHR|PRMT|LEA|SEL|SGXT|BMSK|POPC|FLO|BREV|P2R|R2P",
}
_CLASS = re.compile("|".join(f"(?P<{kind}>(?:{p})(?![A-Z0-9_]))" for kind, p in CLASSES.items()))
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][\w.]*)\s*([^;]*)")
_LABEL = re.compile(r"(\.L_\w+):")
_BRANCH_TARGET = re.compile(r"`\((\.L_\w+)\)")
# a loop of so few instructions polls a barrier
_POLL = 4


@dataclass(frozen=True)
class Instruction:
    """A line: name with suffixes, operands, whether a predicate guards it, shape descriptor."""

    name: str
    operands: str
    guarded: bool
    descriptor: int = 0

    @property
    def kind(self) -> str:
        """One of ``CLASSES``, or ``"other"``: barriers, branches, fences."""
        found = _CLASS.match(self.name)
        return str(found.lastgroup) if found and found.lastgroup else "other"

    @property
    def target(self) -> str | None:
        """The label that it branches to. A call of a subroutine comes back, and is none."""
        found = _BRANCH_TARGET.search(self.operands)
        return found[1] if found and self.name.startswith(("BRA", "CALL", "JMP")) else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow."""
        # BRA.U takes its condition as an operand
        guarded = self.guarded or re.match(r"!?U?P[0-9]", self.operands)
        ends = ("EXIT", "RET", "BRA", "BRX", "JMP", "KILL")
        return bool(guarded) or not self.name.startswith(ends)


@dataclass
class Block:
    """Instructions that run one after the other, and the indices of the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


def control_flow(disassembly: str) -> list[Block]:
    """The blocks of the first function, the entry first."""
    blocks, labels, constants = [Block()], {}, {"": 0}
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif found := _LINE.search(line):
            guard, name, operands = found.groups()
            # the shape of a matrix instruction of sm_100 is a constant in a register
            if name == "UMOV" and (moved := re.match(r"(\w+), (0x[0-9a-f]+)", operands)):
                constants[moved[1]] = int(moved[2], 16)
            register = re.search(r"idesc\[(\w+)\]", operands)
            descriptor = constants.get(register[1] if register else "", 0)
            instruction = Instruction(name, operands.strip(), guard is not None, descriptor)
            blocks[-1].instructions.append(instruction)
            if instruction.target or not instruction.falls_through:
                blocks.append(Block())
    for index, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if (last is None or last.falls_through) and index + 1 < len(blocks):
            block.successors.append(index + 1)
        if last and last.target in labels:
            block.successors.append(labels[last.target])
    return blocks


def innermost_loops(blocks: Sequence[Block]) -> list[frozenset[int]]:
    """The blocks of each innermost natural loop: all that leads back without passing its head.

    Innermost is one that contains no other or, with matrix instructions, none that has them too.
    """
    dominators = _dominators(blocks)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for index in dominators:
        for successor in blocks[index].successors:
            predecessors[successor].append(index)
    bodies: dict[int, set[int]] = {}
    for index in dominators:
        for header in blocks[index].successors:
            if header not in dominators[index]:
                continue
            body, todo = bodies.setdefault(header, {header}), [index]
            while todo:
                if (block := todo.pop()) not in body:
                    body.add(block)
                    todo += predecessors[block]

    def count(body: Iterable[int], kind: str | None = None) -> int:
        return sum(i.kind == kind or not kind for b in body for i in blocks[b].instructions)

    loops = [frozenset(body) for body in bodies.values() if count(body) > _POLL]
    matrix = [loop for loop in loops if count(loop, "matrix")]
    return [a for a in loops if not any(b < a for b in (matrix if a in matrix else loops))]


def reachable(blocks: Sequence[Block]) -> set[int]:
    """Indices of the blocks that the entry leads to."""
    seen, todo = set(), [0]
    while todo:
        if (index := todo.pop()) not in seen:
            seen.add(index)
            todo += blocks[index].successors
    return seen


def _dominators(blocks: Sequence[Block]) -> dict[int, set[int]]:
    """Of every reachable block, those that each path from the entry to it passes."""
    inside = reachable(blocks)
    dominators = {index: set(inside) for index in inside}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for index in sorted(inside - {0}):
            before = [dominators[p] for p in inside if index in blocks[p].successors]
            new = set.intersection(*before) | {index}
            changed |= new != dominators[index]
            dominators[index] = new
    return dominators
