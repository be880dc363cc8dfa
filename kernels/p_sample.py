"""One row of a step table in one pass: guidance, clipping, history, noise, in-painting and the next model input.

`fastdiff.table` defines what a row means; this file executes it for any mixture of rows in a batch.
"""

import torch
from torch import Tensor

from fastdiff.kernels.checks import check_no_grad, expanded
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET, DeviceTable, check_arguments
from fastdiff.kernels.dispatch import LAUNCH_OPTIONS, device_guard, tl, triton, use_triton
from fastdiff.kernels.layout import MAX_ELEMENTS, in_lane_order, is_channels_last, merge_strides, sample_extent
from fastdiff.kernels.philox import normal_at, normal_block, normal_ref, per_sample, sample_index

BLOCK_SIZE = 1024
NUM_WARPS = 4


@triton.jit
def _offsets(c, p, inner, stride_c, stride_o, stride_i, SPLIT: tl.constexpr):
    """Offsets within a sample of channels c and positions p; SPLIT where the spatial axes need two strides."""
    if SPLIT:
        return c * stride_c + (p // inner) * stride_o + (p % inner) * stride_i
    else:
        return c * stride_c + p * stride_i


@triton.jit
def _p_sample_kernel(
    x_ptr,
    model_output_ptr,
    uncond_ptr,
    history_ptr,
    noise_ptr,
    seed_ptr,
    sample_ptr,
    threshold_ptr,
    rescale_ptr,
    grad_ptr,
    mask_ptr,
    known_ptr,
    model_input_ptr,
    x0_ptr,
    floats_ptr,
    integers_ptr,
    row_ptr,
    n_rows,
    n_elements,
    n_blocks,
    positions,
    inner,
    copy_offset,
    stride_xb,
    stride_xc,
    stride_xo,
    stride_xi,
    stride_hk,
    stride_hb,
    stride_ib,
    stride_0b,
    stride_mb,
    stride_mc,
    stride_mo,
    stride_mi,
    stride_zb,
    stride_zc,
    stride_zo,
    stride_zi,
    stride_gb,
    stride_gc,
    stride_go,
    stride_gi,
    stride_ab,
    stride_ac,
    stride_ao,
    stride_ai,
    stride_kb,
    stride_kc,
    stride_ko,
    stride_ki,
    K: tl.constexpr,
    N_COLUMNS: tl.constexpr,
    USES_MODEL: tl.constexpr,
    LEARNED_VARIANCE: tl.constexpr,
    DRAWS: tl.constexpr,
    DUPLICATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    STATE_DENSE: tl.constexpr,
    MODEL_DENSE: tl.constexpr,
    INPUTS_DENSE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    b = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    row = tl.load(row_ptr + b)
    valid = (row >= 0) & (row < n_rows)
    row = tl.where(valid, row, 0).to(tl.int64)
    floats = floats_ptr + row * N_COLUMNS
    integers = integers_ptr + row * 3
    # the literals are positions in FLOAT_COLUMNS; px is in every result, so it carries the poison
    px = tl.where(valid, tl.load(floats + 2), float("nan"))
    pm, cm, um = tl.load(floats + 3), tl.load(floats + 10), tl.load(floats + 15)
    uses_model = (pm != 0.0) | (cm != 0.0) | (um != 0.0)
    vg = tl.load(floats + 7)

    i = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    keep = i < n_elements
    # a skipped load is bounded by 0 elements, which costs the lanes no more than the bound they have anyway
    model_bound = tl.where(uses_model, n_elements, 0)
    # narrow and wide tensors side by side: four neighbours a thread for both
    i = tl.max_contiguous(tl.multiple_of(i, 4), 4)
    if CHANNELS_LAST and MODEL_DENSE and INPUTS_DENSE:
        c, p = i, i
    elif CHANNELS_LAST:
        c, p = i % CHANNELS, i // CHANNELS
    else:
        c, p = i // positions, i % positions
    state = i if STATE_DENSE else _offsets(c, p, inner, stride_xc, stride_xo, stride_xi, SPLIT)

    x = tl.load(x_ptr + b * stride_xb + state, mask=keep, other=0.0).to(tl.float32)
    x0 = px * x
    if USES_MODEL:
        m = tl.zeros([BLOCK_SIZE], tl.float32)
    if model_output_ptr is not None:
        o = i if MODEL_DENSE else _offsets(c, p, inner, stride_mc, stride_mo, stride_mi, SPLIT)
        model_output_ptr += b * stride_mb
        m = tl.load(model_output_ptr + o, mask=i < model_bound, other=0.0).to(tl.float32)
        if uncond_ptr is not None:
            m_uncond = tl.load(uncond_ptr + b * stride_mb + o, mask=i < model_bound, other=0.0).to(tl.float32)
            m = m_uncond + tl.load(floats + 5) * (m - m_uncond)
        if rescale_ptr is not None:
            m = tl.load(rescale_ptr + b, mask=uses_model, other=0.0).to(tl.float32) * m
    if grad_ptr is not None:
        mg = tl.where(uses_model, tl.load(floats + 6), 0.0)
        o = i if INPUTS_DENSE else _offsets(c, p, inner, stride_gc, stride_go, stride_gi, SPLIT)
        bound = tl.where((mg != 0.0) | (vg != 0.0), n_elements, 0)
        grad = tl.load(grad_ptr + b * stride_gb + o, mask=i < bound, other=0.0).to(tl.float32)
        m += mg * grad
    if USES_MODEL:
        x0 += pm * m
    if threshold_ptr is not None:
        limit = tl.load(threshold_ptr + b).to(tl.float32)
        x0 = tl.clamp(x0, -limit, limit, propagate_nan=tl.PropagateNan.ALL) / limit
    else:
        limit = tl.load(floats + 4)
        x0 = tl.clamp(x0, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    if x0_ptr is not None:
        tl.store(x0_ptr + b * stride_0b + state, x0.to(x0_ptr.dtype.element_ty), mask=keep)

    x_next = tl.load(floats + 8) * x + tl.load(floats + 9) * x0
    if USES_MODEL:
        x_next += cm * m
    if K > 0:
        history_ptr += b * stride_hb
        for k in tl.static_range(K):
            h = tl.load(floats + 18 + k)
            bound = tl.where(h != 0.0, n_elements, 0)
            value_ptr = history_ptr + tl.cast(stride_hk, tl.int64) * k
            x_next += h * tl.load(value_ptr + state, mask=i < bound, other=0.0).to(tl.float32)
        slot = tl.where(valid, tl.load(integers), -1)
        y = tl.load(floats + 13) * x + tl.load(floats + 14) * x0
        if USES_MODEL:
            y += um * m
        slot_ptr = history_ptr + slot.to(tl.int64) * stride_hk
        tl.store(slot_ptr + state, y.to(history_ptr.dtype.element_ty), mask=i < tl.where(slot >= 0, n_elements, 0))

    draw = tl.load(integers + 1)
    cz, kz = tl.load(floats + 11), tl.load(floats + 17)
    draws = (draw >= 0) & ((cz != 0.0) | (kz != 0.0))
    std, variance = cz, vg
    if LEARNED_VARIANCE:
        lv = tl.load(floats + 12)
        o = i if MODEL_DENSE else _offsets(c, p, inner, stride_mc, stride_mo, stride_mi, SPLIT)
        variance_ptr = model_output_ptr + tl.cast(stride_mc, tl.int64) * CHANNELS
        bound = tl.where((lv != 0.0) & (draws | (vg != 0.0)), n_elements, 0)
        factor = tl.exp(lv * tl.load(variance_ptr + o, mask=i < bound, other=0.0).to(tl.float32))
        std, variance = std * factor, variance * (factor * factor)
    if DRAWS:
        if noise_ptr is not None:
            o = i if INPUTS_DENSE else _offsets(c, p, inner, stride_zc, stride_zo, stride_zi, SPLIT)
            z = tl.load(noise_ptr + b * stride_zb + o, mask=i < tl.where(draws, n_elements, 0), other=0.0).to(
                tl.float32
            )
        else:
            z = tl.zeros([BLOCK_SIZE], tl.float32)
            if draws:
                seed, sample = tl.load(seed_ptr + b).to(tl.uint64), tl.load(sample_ptr + b).to(tl.uint32)
                stream = tl.load(integers + 2).to(tl.uint32)
                if CHANNELS_LAST:
                    z = normal_block(block * (BLOCK_SIZE // 4), seed, sample, stream, draw.to(tl.uint32), BLOCK_SIZE)
                else:
                    z = normal_at(p * CHANNELS + c, seed, sample, stream, draw.to(tl.uint32))
        x_next += std * z
    if grad_ptr is not None:
        x_next += tl.where(vg != 0.0, variance * grad, 0.0)
    if mask_ptr is not None:
        k0 = tl.load(floats + 16)
        o = i if INPUTS_DENSE else _offsets(c, p, inner, stride_kc, stride_ko, stride_ki, SPLIT)
        bound = tl.where(k0 != 0.0, n_elements, 0)
        kept = k0 * tl.load(known_ptr + b * stride_kb + o, mask=i < bound, other=0.0).to(tl.float32)
        if DRAWS:
            kept += kz * z
        o = i if INPUTS_DENSE else _offsets(c, p, inner, stride_ac, stride_ao, stride_ai, SPLIT)
        # a row with k0 = kz = 0 does not blend: the start and the forward jumps of an in-painting walk
        bound = tl.where((k0 != 0.0) | (kz != 0.0), n_elements, 0)
        weight = tl.load(mask_ptr + b * stride_ab + o, mask=i < bound, other=0.0).to(tl.float32)
        x_next = weight * kept + (1.0 - weight) * x_next
    tl.store(x_ptr + b * stride_xb + state, x_next.to(x_ptr.dtype.element_ty), mask=keep)
    if model_input_ptr is not None:
        model_input = (tl.load(floats + 1) * x_next).to(model_input_ptr.dtype.element_ty)
        model_input_ptr += b * stride_ib
        tl.store(model_input_ptr + state, model_input, mask=keep)
        if DUPLICATE:
            tl.store(model_input_ptr + copy_offset + state, model_input, mask=keep)


@torch.library.custom_op("fastdiff::p_sample_", mutates_args=("x", "history", "model_input_out", "x0_out"))
def _p_sample_op(
    x: Tensor,
    model_output: Tensor | None,
    floats: Tensor,
    integers: Tensor,
    row: Tensor,
    model_output_uncond: Tensor | None,
    history: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_indices: Tensor | None,
    threshold: Tensor | None,
    rescale: Tensor | None,
    grad: Tensor | None,
    mask: Tensor | None,
    known: Tensor | None,
    model_input_out: Tensor | None,
    x0_out: Tensor | None,
) -> None:
    batch, channels, positions = sample_extent(x.shape)
    n_elements = channels * positions
    n_blocks = triton.cdiv(n_elements, BLOCK_SIZE)
    if batch * n_blocks >= 2**31:
        raise ValueError(f"x of shape {list(x.shape)} needs {batch * n_blocks} programs, fewer than 2^31 are accepted")
    channels_last = is_channels_last(x)
    learned_variance = model_output is not None and model_output.shape[1] != channels
    model = None if model_output is None else model_output[:, :channels]
    inputs = [model, noise, grad, mask, known]
    state_dense = in_lane_order(x, channels_last)
    model_dense = model is None or in_lane_order(model, channels_last)
    inputs_dense = all(value is None or in_lane_order(value, channels_last) for value in inputs[1:])
    walked = [] if state_dense else [x]
    walked += [value for value in inputs if value is not None and not (model_dense if value is model else inputs_dense)]
    inner, split = 1, False
    strides: dict[int, tuple[int, ...]] = {}
    if walked:
        extent, merged = merge_strides(*walked)
        inner, split = extent.inner, extent.inner != positions
        strides = {id(value): within for value, within in zip(walked, merged)}
        for value in walked:
            if sum((size - 1) * stride for size, stride in zip(value.shape[1:], value.stride()[1:])) > MAX_ELEMENTS:
                raise ValueError(
                    f"a sample of strides {value.stride()[1:]} and shape {list(value.shape[1:])} spans more than "
                    f"{MAX_ELEMENTS} elements: pass contiguous or channels-last tensors"
                )

    def strides_of(value: Tensor | None) -> tuple[int, ...]:
        if value is None:
            return (0, 0, 0, 0)
        # a dense tensor needs its channel stride only to find the variance channels
        return strides.get(id(value), (value.stride(0), value.stride(1), 0, 0))

    # a constexpr, for a cheap division; 0 where the launch does not need it, so that channel counts share a kernel
    needs_channels = learned_variance or (channels_last and bool(walked)) or (not channels_last and seed is not None)
    n_slots = 0 if history is None else history.shape[0]
    with device_guard(x):
        _p_sample_kernel[(batch * n_blocks,)](
            x,
            model_output,
            model_output_uncond,
            history if n_slots else None,
            noise,
            seed,
            sample_indices,
            None if threshold is None else threshold.contiguous(),
            None if rescale is None else rescale.contiguous(),
            grad,
            mask,
            known,
            model_input_out,
            x0_out,
            floats,
            integers,
            row,
            floats.shape[0],
            n_elements,
            n_blocks,
            positions,
            inner,
            0 if model_input_out is None else batch * model_input_out.stride(0),
            *strides_of(x),
            *(history.stride()[:2] if history is not None and n_slots else (0, 0)),
            0 if model_input_out is None else model_input_out.stride(0),
            0 if x0_out is None else x0_out.stride(0),
            *(stride for value in inputs for stride in strides_of(value)),
            K=n_slots,
            N_COLUMNS=floats.shape[1],
            USES_MODEL=model is not None or grad is not None,
            LEARNED_VARIANCE=learned_variance,
            DRAWS=noise is not None or seed is not None,
            DUPLICATE=model_input_out is not None and model_input_out.shape[0] != batch,
            CHANNELS=channels if needs_channels else 0,
            CHANNELS_LAST=channels_last,
            STATE_DENSE=state_dense,
            MODEL_DENSE=model_dense,
            INPUTS_DENSE=inputs_dense,
            SPLIT=split,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )


@_p_sample_op.register_fake
def _(*arguments):
    return None


def p_sample_ref(
    x: Tensor,
    model_output: Tensor | None,
    table: DeviceTable,
    row: Tensor,
    *,
    model_output_uncond: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    sample_indices: Tensor | None = None,
    threshold: Tensor | None = None,
    rescale: Tensor | None = None,
    grad: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    model_input_out: Tensor | None = None,
    x0_out: Tensor | None = None,
) -> None:
    """`p_sample_` in plain PyTorch, operation by operation; seed and sample_indices are int64 [B] here."""
    batch, channels = x.shape[0], x.shape[1]
    valid = (row >= 0) & (row < table.floats.shape[0])
    index = torch.where(valid, row, 0).long()

    def spread(value: Tensor) -> Tensor:
        return value.view(batch, *[1] * (x.ndim - 1))

    columns = [spread(column) for column in table.floats[index].unbind(1)]
    c = dict(zip(FLOAT_COLUMNS, columns))
    slot, draw, stream = table.integers[index].unbind(1)

    state = x.float()
    px = torch.where(spread(valid), c["px"], torch.nan)
    x0 = px * state
    uses_model = (c["pm"] != 0) | (c["cm"] != 0) | (c["um"] != 0)
    m = None
    if model_output is not None:
        m = model_output[:, :channels].float()
        if model_output_uncond is not None:
            m_uncond = model_output_uncond[:, :channels].float()
            m = m_uncond + c["g"] * (m - m_uncond)
        if rescale is not None:
            m = spread(rescale) * m
    if grad is not None:
        grad = grad.float()
        guide = torch.where(c["mg"] != 0, c["mg"] * grad, 0.0)
        m = guide if m is None else m + guide
    if m is not None:
        m = torch.where(uses_model, m, 0.0)
        x0 = x0 + c["pm"] * m
    if threshold is None:
        x0 = torch.clamp(x0, -c["lim"], c["lim"])
    else:
        limit = spread(threshold)
        x0 = torch.clamp(x0, -limit, limit) / limit

    x_next = c["cx"] * state + c["c0"] * x0
    if m is not None:
        x_next = x_next + c["cm"] * m
    if history is not None:
        for h, value in zip(columns[HISTORY_OFFSET:], history.unbind(0)):
            x_next = x_next + torch.where(h != 0, h * value.float(), 0.0)

    draws = spread(draw >= 0) & ((c["cz"] != 0) | (c["kz"] != 0))
    std, variance = c["cz"], c["vg"]
    if model_output is not None and model_output.shape[1] != channels:
        reads = (c["lv"] != 0) & (draws | (c["vg"] != 0))
        factor = torch.exp(c["lv"] * torch.where(reads, model_output[:, channels:].float(), 0.0))
        std, variance = std * factor, variance * (factor * factor)
    z = None
    if noise is not None:
        z = torch.where(draws, noise.float(), 0.0)
    elif seed is not None and sample_indices is not None:
        z = normal_ref(seed, sample_indices, draw.long(), stream.long(), tuple(x.shape), is_channels_last(x))
        z = torch.where(draws, z, 0.0)
    if z is not None:
        x_next = x_next + std * z
    if grad is not None:
        x_next = x_next + torch.where(c["vg"] != 0, variance * grad, 0.0)
    if mask is not None and known is not None:
        kept = torch.where(c["k0"] != 0, c["k0"] * known.float(), 0.0)
        if z is not None:
            kept = kept + c["kz"] * z
        mask = torch.where((c["k0"] != 0) | (c["kz"] != 0), mask.float(), 0.0)
        x_next = mask * kept + (1.0 - mask) * x_next

    if history is not None and history.shape[0] > 0:
        y = c["ux"] * state + c["u0"] * x0
        if m is not None:
            y = y + c["um"] * m
        sample = torch.arange(batch, device=x.device)
        keeps = valid & (slot >= 0)
        target = torch.where(keeps, slot, 0).long()
        y = torch.where(spread(keeps), y.to(history.dtype), history[target, sample])
        history.index_put_((target, sample), y)
    if x0_out is not None:
        x0_out.copy_(x0)
    if model_input_out is not None:
        model_input_out.view(-1, *x.shape).copy_((c["c_next"] * x_next).to(model_input_out.dtype))
    x.copy_(x_next)


def p_sample_(
    x: Tensor,
    model_output: Tensor | None,
    table: DeviceTable,
    row: Tensor,
    *,
    model_output_uncond: Tensor | None = None,
    history: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_indices: Tensor | None = None,
    threshold: Tensor | None = None,
    rescale: Tensor | None = None,
    grad: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    model_input_out: Tensor | None = None,
    x0_out: Tensor | None = None,
) -> None:
    """Execute one row of a step table for every sample, in one pass, in place on x.

    The formulas are those of `fastdiff.table`, in float32 arithmetic. What a row multiplies by zero (model output,
    history slot, gradient, known, noise) is not read, so it may hold anything. A row number out of [0, R) reads nothing
    out of bounds and fills that sample of x, x0_out and model_input_out with NaN; its history stays.

    Args:
        x: [B, C, *spatial] float32, float16 or bfloat16: the state; becomes that of the next row.
        model_output: [B, C, *spatial] in any float dtype and layout, or [B, 2C, *spatial] with the learned-variance
            channels v in the second half; None where no row evaluates a model.
        table: the packed rows, on the device of x, as all other tensors.
        row: int32 [B] row number of each sample.
        model_output_uncond: like model_output, of the same strides: classifier-free guidance by the rows' g.
        history: [K, B, C, *spatial] remembered values, each slot laid out as x; needed where K > 0.
        noise: like x: the noise of every row that draws.
        seed: int in [0, 2^63) or int64 [B]: noise of the noise contract, from the rows' stream and draw, instead.
        sample_indices: int64 [B], 0..B-1 by default.
        threshold: float [B]: x0 = clamp(x0, -s, s) / s in place of the rows' lim (Saharia et al. 2022, section 2.3).
        rescale: float [B]: factor of the guided model output (Lin et al. 2023, section 3.4).
        grad: like x: gradient of a classifier, weighted by the rows' mg and vg.
        mask, known: broadcastable to x: in-painting, mask = 1 keeps known, in rows with k0 or kz.
        model_input_out: [B, ...] or [2B, ...] (written twice, for guidance), laid out as x: c_in of the next row times
            the new state.
        x0_out: like x, laid out as x: the clipped data prediction.

    Raises:
        TypeError: an argument that must be a tensor is none.
        ValueError: shapes, dtypes, devices or layouts that do not fit, mask without known, both noise and seed, or a
            tensor that requires grad while grad mode is on.
    """
    if (mask is None) != (known is None):
        raise ValueError("mask and known must be given together")
    if noise is not None and seed is not None:
        raise ValueError("noise and seed must not both be given: exactly one source of noise is used")
    if mask is not None and known is not None:
        mask, known = expanded("mask", mask, x), expanded("known", known, x)
    inputs = {"noise": noise, "grad": grad, "mask": mask, "known": known}
    scales = {"threshold": threshold, "rescale": rescale}
    outputs = {"model_input_out": model_input_out, "x0_out": x0_out}
    check_no_grad(x=x, model_output=model_output, model_output_uncond=model_output_uncond, history=history)
    check_no_grad(**inputs, **scales, **outputs)
    check_arguments(x, model_output, table, row, model_output_uncond, history, inputs, scales, outputs)
    if x.numel() == 0:
        return
    seeds = None if seed is None else per_sample(seed, x.shape[0], x.device, "seed")
    options: dict[str, Tensor | None] = {
        "model_output_uncond": model_output_uncond,
        "history": history,
        "noise": noise,
        "seed": seeds,
        "sample_indices": None if seeds is None else sample_index(sample_indices, x.shape[0], x.device),
        **scales,
        "grad": grad,
        "mask": mask,
        "known": known,
        **outputs,
    }
    if use_triton(x):
        floats, integers, row = (value.contiguous() for value in (*table, row))
        _p_sample_op(x, model_output, floats, integers, row, **options)
    else:
        p_sample_ref(x, model_output, table, row, **options)
