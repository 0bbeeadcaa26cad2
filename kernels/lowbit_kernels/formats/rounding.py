"""Float weights to quantized weights: nearest rounding, error-minimizing scales, HQQ.

Dimension key: N output channels, K the reduction, S scale groups a row, G weights a group.
Every method first chooses one float scale a group, then ``_two_level`` splits it into the format's
integer group scale and fp32 row scale.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit_kernels.formats.packing import pack, to_codes
from lowbit_kernels.formats.spec import QuantSpec
from lowbit_kernels.formats.weight import MAX_GROUP_SCALE, TENSORS, QuantizedWeight

METHODS = ("rtn", "search", "hqq")

# weights rounded at a time: a few temporaries of them fit the second-level cache
CHUNK = 1 << 18

# shrinkage exponent, penalty, its growth and steps as published for HQQ
# (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023)
HQQ_P, HQQ_BETA, HQQ_KAPPA, HQQ_STEPS = 0.7, 10.0, 1.01, 20


@dataclass(frozen=True)
class _Groups:
    """A weight cut into scale groups, zero-padded: values and valid mask, both [N, S, G]."""

    values: Tensor
    valid: Tensor


def quantize_weight(weight: Tensor, spec: QuantSpec, method: str = "rtn") -> QuantizedWeight:
    """Quantize a weight [N, K] to the packed format.

    Args:
        weight: [N, K], floating point, finite; see ``packing.py`` for a convolution's view.
        spec: what to quantize to.
        method: ``"rtn"``: scales from the largest magnitude (8 and 4 bits) or from the error
            (2 and 1 bits, where the largest magnitude says little), codes by nearest rounding;
            ``"search"``: the scale of least squared error (symmetric only); ``"hqq"``:
            half-quadratic splitting, which lets outliers go (Badri and Shaji, 2023).

    Returns:
        The quantized weight, on ``weight``'s device.

    Raises:
        ValueError: if ``weight`` is not a finite floating-point matrix or ``method`` is unknown.
    """
    _check(weight, method)
    if not spec.symmetric and method == "search":
        raise ValueError("method must be 'rtn' or 'hqq' with symmetric=False, got 'search'")
    shared = _tensor_scale(weight, spec, method) if spec.group_size == "tensor" else None
    parts = [_quantize_rows(rows, spec, method, shared) for rows in _row_chunks(weight)]
    joined: dict[str, Any] = {}
    for name in TENSORS:
        tensors = [getattr(part, name) for part in parts]
        joined[name] = None if tensors[0] is None else torch.cat(tensors)
    return replace(parts[0], **joined)


def _row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows [n, K] at a time: rows are independent, and small temporaries stay in the cache."""
    return torch.split(weight.detach(), max(1, CHUNK // weight.shape[1]))  # type: ignore[no-untyped-call, no-any-return]


def _tensor_scale(weight: Tensor, spec: QuantSpec, method: str) -> Tensor:
    """The largest row scale of a weight, [1, 1]."""
    chunks = (_split(rows.float(), spec) for rows in _row_chunks(weight))
    scales = [_flat_scale(groups, spec.bits, method).amax() for groups in chunks]
    return torch.stack(scales).amax().view(1, 1)


def _quantize_rows(
    weight: Tensor, spec: QuantSpec, method: str, shared: Tensor | None
) -> QuantizedWeight:
    groups, (N, K) = _split(weight.float(), spec), weight.shape
    if not spec.symmetric:
        return _asymmetric(groups, K, spec, method)
    flat = _flat_scale(groups, spec.bits, method) if shared is None else shared.expand(N, 1)
    group_scale, scale = _two_level(groups, flat, spec)
    step = scale[:, None] if group_scale is None else group_scale * scale[:, None]
    levels = _nearest(groups.values, step[..., None], spec.bits)
    levels = levels.to(torch.int8).flatten(1)[:, :K].contiguous()
    qweight = pack(to_codes(levels, spec.bits), spec.bits)
    group_scale = None if group_scale is None else group_scale.to(torch.uint8)
    return QuantizedWeight(qweight, scale, group_scale, None, K, spec)


def quantize_depthwise_weight(
    weight: Tensor, spec: QuantSpec, method: str = "rtn"
) -> QuantizedWeight:
    """Quantize a depthwise convolution's weight [C, taps]: one scale a channel, levels unpacked.

    Raises:
        ValueError: as ``quantize_weight``; also for ``symmetric=False``, which it cannot hold.
    """
    _check(weight, method)
    if not spec.symmetric:
        raise ValueError("symmetric must be True for a depthwise convolution, got False")
    groups = _Groups(weight.detach().float()[:, None], torch.ones_like(weight[:, None]).bool())
    scale = _flat_scale(groups, spec.bits, method)[:, 0]
    if spec.group_size == "tensor":
        scale = scale.max().expand_as(scale).contiguous()
    levels = _nearest(weight.detach().float(), scale[:, None], spec.bits).to(torch.int8)
    return QuantizedWeight(levels.t().contiguous(), scale, None, None, weight.shape[1], spec)


def _check(weight: Tensor, method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            "weight must be a floating-point matrix [N, K], "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"weight must be finite, got {bad} NaN or infinite values")


def _split(weight: Tensor, spec: QuantSpec) -> _Groups:
    N, K = weight.shape
    G = spec.group or K
    S = -(-K // G)
    padded = torch.nn.functional.pad(weight, (0, S * G - K))
    valid = torch.arange(S * G, device=weight.device).view(1, S, G) < K
    return _Groups(padded.view(N, S, G), valid.expand(N, S, G))


def _nearest(values: Tensor, step: Tensor, bits: int) -> Tensor:
    """Nearest level, float; a zero step gives the level nearest zero."""
    x = torch.where(step > 0, values / step, 0.0)
    if bits == 8:
        return x.round().clamp(-127, 127)
    if bits == 4:
        return x.round().clamp(-8, 7)
    top = 2**bits - 1
    return 2 * ((x + top) / 2).round().clamp(0, top) - top  # type: ignore[no-any-return]


def _error(groups: _Groups, step: Tensor, bits: int) -> Tensor:
    """Squared error a group [N, S] of rounding with step [N, S]."""
    step = step[..., None]
    residual = groups.values - _nearest(groups.values, step, bits) * step
    return (residual.square() * groups.valid).sum(-1)


def _flat_scale(groups: _Groups, bits: int, method: str) -> Tensor:
    """One float scale a group [N, S]."""
    top = {8: 127, 4: 7, 2: 3, 1: 1}[bits]
    largest = groups.values.abs().amax(-1) / top
    if bits == 1:  # the mean magnitude is the exact least-squares scale of a sign
        scale = groups.values.abs().sum(-1) / groups.valid.sum(-1)
    elif bits == 2 or method != "rtn":
        scale = _search(groups, largest, bits)
    else:
        scale = largest
    return _hqq_scale(groups, scale, bits) if method == "hqq" else scale


def _search(groups: _Groups, largest: Tensor, bits: int) -> Tensor:
    best = largest
    best_error = _error(groups, best, bits)
    # below these shares of the largest magnitude clipping always costs more than it saves
    low = {8: 0.5, 4: 0.4, 2: 0.2}[bits]
    for share in torch.linspace(1.0, low, 41).tolist()[1:]:
        error = _error(groups, largest * share, bits)
        better = error < best_error
        best = torch.where(better, largest * share, best)
        best_error = torch.where(better, error, best_error)
    return best


def _shrink(residual: Tensor, beta: float) -> Tensor:
    magnitude = residual.abs()
    # 0 ** (p - 1) is infinite; the maximum with 0 makes it vanish
    threshold = magnitude.clamp_min(1e-12).pow(HQQ_P - 1) / beta
    return residual.sign() * (magnitude - threshold).clamp_min(0)


def _unit(groups: _Groups) -> Tensor:
    """Root mean square of each row [N, 1, 1]: HQQ's penalty is made for weights of unit size."""
    return groups.values.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-12)


def _hqq_scale(groups: _Groups, scale: Tensor, bits: int) -> Tensor:
    """HQQ for levels around zero: the scale takes the place of the published zero point."""
    unit = _unit(groups)
    values = groups.values / unit
    scale, beta = scale / unit[..., 0], HQQ_BETA
    for _ in range(HQQ_STEPS):
        levels = _nearest(values, scale[..., None], bits) * groups.valid
        outliers = _shrink(values - levels * scale[..., None], beta)
        power = levels.square().sum(-1)
        fitted = ((values - outliers) * levels).sum(-1) / power.clamp_min(1)
        scale = torch.where((power > 0) & (fitted > 0), fitted, scale)
        beta *= HQQ_KAPPA
    return scale * unit[..., 0]


def _two_level(groups: _Groups, flat: Tensor, spec: QuantSpec) -> tuple[Tensor | None, Tensor]:
    """Split scales [N, S] into (group_scale [N, S] or None, scale [N]), both fp32."""
    if not spec.group:
        return None, flat[:, 0].contiguous()
    top = MAX_GROUP_SCALE[spec.bits]
    scale = flat.amax(1) / top
    ideal = torch.where(scale[:, None] > 0, flat / scale[:, None], 1.0)
    upper = ideal.ceil().clamp(1, top)
    lower = (upper - 1).clamp_min(1)
    errors = [_error(groups, share * scale[:, None], spec.bits) for share in (lower, upper)]
    return torch.where(errors[0] < errors[1], lower, upper), scale


def _asymmetric(groups: _Groups, K: int, spec: QuantSpec, method: str) -> QuantizedWeight:
    values, top = groups.values, 2**spec.bits - 1
    # zero stays representable, so a nearly constant group needs no zero point beyond fp16
    low, high = values.amin(-1).clamp_max(0), values.amax(-1).clamp_min(0)
    smallest = torch.finfo(torch.float16).tiny
    scale = ((high - low) / top).clamp_min(smallest).half().float()
    if torch.isinf(scale).any():
        raise ValueError(
            "weight must fit fp16 scales with symmetric=False, "
            f"got a largest magnitude of {values.abs().max().item():.3g}"
        )
    zero = (-low / scale).half().float()
    if method == "hqq":
        zero = _hqq_zero(groups, scale, zero, top).half().float()
    codes = (values / scale[..., None] + zero[..., None]).round().clamp(0, top)
    qweight = pack(codes.to(torch.uint8).flatten(1)[:, :K].contiguous(), spec.bits)
    return QuantizedWeight(qweight, scale.half(), None, zero.half(), K, spec)


def _hqq_zero(groups: _Groups, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    count, beta = groups.valid.sum(-1), HQQ_BETA
    step = scale[..., None]
    unit = _unit(groups)
    for _ in range(HQQ_STEPS):
        codes = (groups.values / step + zero[..., None]).round().clamp(0, top)
        residual = groups.values - (codes - zero[..., None]) * step
        outliers = _shrink(residual / unit, beta) * unit
        zero = ((codes - (groups.values - outliers) / step) * groups.valid).sum(-1) / count
        beta *= HQQ_KAPPA
    return zero
