"""Every backend that could serve a layer, with its default tiles: what dispatch chooses between."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench import ladder
from bench import linear_points as points
from bench.case import ALL_MODES, Case, Prepared, Provider, Row
from bench.cases.linear_cpu import Inputs, cost, make_inputs, ours
from bench.cases.linear_cuda import BASELINE, SETS
from lowbit_kernels import QLinear, QuantSpec

POINTS = tuple(
    replace(p, goals=()) for p in (*points.BATCH1[:3], *points.LARGE, *points.STREAM[:3])
)


def backend(name: str, int8: bool) -> Provider:
    """A 4-bit layer through one backend."""

    def prepare(inputs: Inputs) -> Prepared:
        spec = QuantSpec(bits=4, inputs="int8" if int8 else None)
        layer, x = QLinear.from_float(inputs.linear, spec), inputs.x
        gpu = ladder.gpu_of(x.device)
        epilogue = "gelu" if inputs.gelu else None
        layer_is = (len(x), *inputs.linear.weight.shape, spec, x.dtype, epilogue, gpu)
        found = ladder.choices(*layer_is)
        if name not in found:
            raise NotImplementedError(f"{name} does not serve {len(x)} rows here")
        call: Callable[[], Tensor] = ladder.forced(layer, x, epilogue, found[name][0])
        chosen = ladder.default_choice(*layer_is).backend

        def facts() -> Row:
            return {"backend": f"{name}{' (chosen)' * (name == chosen)}"}

        return replace(ours(inputs, int8), call=call, facts=facts)

    kind = "int8" if int8 else "float"
    return Provider(f"lowbit w4, {kind} inputs, {name}", prepare, gpu_only=True)


LINEAR_LADDER = Case(
    name="linear_ladder",
    title="Backends of a 4-bit linear layer",
    points=POINTS,
    make_inputs=make_inputs,
    providers=(
        BASELINE,
        *(backend(name, int8=False) for name in ("fused", "dequant_cublas", "csrc")),
        *(backend(name, int8=True) for name in ("fused", "resident_int8")),
    ),
    baseline=points.CUBLAS,
    cost=cost,
    layout="goals",
    device="cuda",
    dtype=torch.bfloat16,
    small=points.small(POINTS),
    sets=SETS,
    modes=ALL_MODES,
)
