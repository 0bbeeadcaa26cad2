"""The rolling register window of the depthwise kernels.

Dimension key: W outputs of a lane (a channel of a run of frames), Q steps.

A lane adds ``x[i + q] * w[q]`` to its sums i < W, for all q < Q. The last W inputs stay in
registers, so that a step loads one x and one w for W multiply-adds. Convolution: q is a tap, w the
weight. Gradient of the weight: i is a tap, q a frame, w the gradient of the output.

Q is padded to a multiple of W with w = 0, so an input that is not finite can spoil the outputs of
up to W - 1 frames before those that its taps reach.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl


@triton.jit
def _load_x(
    x_ptrs, x_scale_ptrs, stride_x, first, limit,
    STEP: tl.constexpr, UPSAMPLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # frame first + STEP, 0 outside of [0, limit)
    mask = (-first <= STEP) & (limit - first > STEP)
    offs = STEP * stride_x
    if UPSAMPLE > 1:
        # x has UPSAMPLE - 1 zeros between its frames, and x_ptrs points to frame 0
        mask &= (first + STEP) % UPSAMPLE == 0
        offs = ((first + STEP) // UPSAMPLE).to(tl.int64) * stride_x
    x = tl.load(x_ptrs + offs, mask=mask, other=0).to(ACC)
    if x_scale_ptrs is not None:
        x *= tl.load(x_scale_ptrs + STEP, mask=mask, other=0.0)
    return x


@triton.jit
def _turn(
    acc, window, x_ptrs, x_scale_ptrs, w_ptrs, stride_x, stride_w, first, limit, rest,
    STEPS: tl.constexpr, SURE: tl.constexpr, LEAP: tl.constexpr, UPSAMPLE: tl.constexpr,
    WINDOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    for q in tl.static_range(STEPS):
        x = _load_x(
            x_ptrs, x_scale_ptrs, stride_x, first, limit, LEAP * (WINDOW - 1 + q), UPSAMPLE, ACC
        )
        if q < SURE:
            w = tl.load(w_ptrs + q * stride_w).to(ACC)
        else:
            w = tl.load(w_ptrs + q * stride_w, mask=rest > q, other=0).to(ACC)
        window += (x,)
        updated = ()
        for i in tl.static_range(WINDOW):
            updated += (acc[i] + window[i] * w,)
        acc, window = updated, window[1:]
    return acc, window


@triton.jit
def walk(
    acc, x_ptrs, x_scale_ptrs, w_ptrs, stride_x, stride_w, first, limit, steps,
    STEPS: tl.constexpr, LEAP: tl.constexpr, UPSAMPLE: tl.constexpr, WINDOW: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The sums after all steps.

    acc: W tensors. x_ptrs, w_ptrs, first: of each lane, x of step 0 (with UPSAMPLE: frame 0), w of
    step 0, and the frame of step 0. Step q of output i reads frame ``first + LEAP * (i + q)``.
    STEPS: the number of steps if it is known to the compiler, else None.
    """
    window = ()
    for i in tl.static_range(WINDOW - 1):
        x = _load_x(x_ptrs, x_scale_ptrs, stride_x, first, limit, LEAP * i, UPSAMPLE, ACC)
        window += (x,)
    if STEPS is not None and STEPS <= WINDOW:
        acc, window = _turn(
            acc, window, x_ptrs, x_scale_ptrs, w_ptrs, stride_x, stride_w, first, limit, steps,
            STEPS, STEPS, LEAP, UPSAMPLE, WINDOW, ACC,
        )  # fmt: skip
    else:
        # a turn renews the whole window, so no register is moved; the last is padded with zeros
        sure: tl.constexpr = 0 if STEPS is None else (STEPS - 1) % WINDOW + 1
        for start in range(0, steps, WINDOW):
            # a vector, though all its values are equal: the interpreter cannot mask with a scalar
            rest = steps - start + tl.zeros_like(first)
            acc, window = _turn(
                acc, window, x_ptrs, x_scale_ptrs, w_ptrs, stride_x, stride_w, first, limit, rest,
                WINDOW, sure, LEAP, UPSAMPLE, WINDOW, ACC,
            )  # fmt: skip
            first += LEAP * WINDOW
            if UPSAMPLE == 1:
                x_ptrs += LEAP * WINDOW * stride_x
            if x_scale_ptrs is not None:
                x_scale_ptrs += LEAP * WINDOW
            w_ptrs += WINDOW * stride_w
    return acc


@triton.jit
def lanes(C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Run, channel to read, channel to write, and whether there is one to write, of each lane.

    A program has BLOCK // BLOCK_C runs of BLOCK_C channels: any C fills its lanes, and runs that
    follow each other share the cache.
    """
    lane = tl.arange(0, BLOCK)
    offs_c = tl.program_id(1) * BLOCK_C + lane % BLOCK_C
    mask = (offs_c < C) & (lane < BLOCK // BLOCK_C * BLOCK_C)
    # lanes without a channel read the first: VEC neighbors have all one or none
    read = tl.max_contiguous(tl.multiple_of(tl.where(mask, offs_c, 0), VEC), VEC)
    return lane // BLOCK_C, read, offs_c, mask


@triton.jit
def stack(values, LOG2: tl.constexpr):
    """A tuple of 2 ** LOG2 tensors [N] as one [N, 2 ** LOG2]; ``unstack`` is the inverse."""
    for level in tl.static_range(LOG2):
        joined = ()
        for i in tl.static_range(1 << (LOG2 - 1 - level)):
            joined += (tl.join(values[i], values[i + (1 << (LOG2 - 1 - level))]),)
        values = joined
    return tl.reshape(values[0], (values[0].shape[0], 1 << LOG2))


@triton.jit
def unstack(stacked, LOG2: tl.constexpr):
    values = (tl.reshape(stacked, [stacked.shape[0]] + [2] * LOG2),)
    for _ in tl.static_range(LOG2):
        low, high = (), ()
        for i in tl.static_range(len(values)):
            a, b = tl.split(values[i])
            low += (a,)
            high += (b,)
        values = low + high
    return values
