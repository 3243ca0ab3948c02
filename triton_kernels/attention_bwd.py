"""Attention backward in one launch: every gradient written once, no atomics, no fp32 workspace.

A program owns one tile of keys and sums its dK and dV over the queries, or one tile of queries and
sums its dQ over the keys; both roles share the launch and recompute the probabilities.
That is 7 products where a kernel with atomics does 5, and 8 passes over memory where it does 15:
CLIP's rows are short enough for the passes to be what costs. Where one tile holds the whole head,
one program does everything with 5 products.

delta, the row sum of dOut * Out, is formed where it is needed. The head gate's gradient is the same
row sum of the ungated output, sum P * dP, one partial a tile of queries.

Letters: B batch, L tokens (Lq queries, Lk keys), H heads, D head dim.
"""

import torch
import triton
import triton.language as tl

from .attention_fwd import (
    block_d,
    gate_arguments,
    kept_keys,
    load_rows,
    mask_arguments,
    near,
    scale_arguments,
    scores,
    store_rows,
    tensor_arguments,
)
from .launch import Launch, dot_precision
from .tiling import split, tiles
from .tuning import choose, kind_of


@triton.jit
def _load_queries(
    start_m, offs_m, q_base, do_base, o_base, stats_base, stride_q, stride_do, stride_o,
    stride_stats, Lq, D: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """q, dout, maximum and reciprocal sum of the softmax, and delta, of some queries."""
    in_rows = offs_m < Lq
    m = tl.load(stats_base + offs_m, mask=in_rows, other=0.0)
    l = tl.load(stats_base + stride_stats + offs_m, mask=in_rows, other=0.0)  # noqa: E741
    # Beyond the rows, and for a query that saw no key, the sum is 0 and so is every probability.
    saw = l != 0.0
    # What a query holds that saw none, and its gradient, may be NaN and must not meet that 0.
    real = saw if HAS_MASK else in_rows
    q = load_rows(q_base, start_m, stride_q, real, D, BLOCK_D)
    do = load_rows(do_base, start_m, stride_do, real, D, BLOCK_D)
    o = load_rows(o_base, start_m, stride_o, real, D, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    return q, do, tl.where(saw, m, 0.0), tl.where(saw, 1.0 / tl.where(saw, l, 1.0), 0.0), delta


@triton.jit
def _tile(
    q, do, m, inverse, delta, k, v, keep, offs_m, offs_n, gate, scale_log2,
    CAUSAL: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[M, N] P, dP and dS of some queries against some keys; what a caller drops costs nothing.

    The scores are formed as forward formed them, so that where one key takes all, P is 1 exactly.
    """
    s = scores(q, k, NEGATE, PRECISION)
    seen = keep[None, :] & (offs_m[:, None] >= offs_n[None, :]) if CAUSAL else keep[None, :]
    p = tl.where(seen, tl.exp2((s - m[:, None]) * scale_log2) * inverse[:, None], 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp * gate - delta[:, None])
    return p, dp, ds


@triton.jit
def _masked_rows(gradient, keep, HAS_MASK: tl.constexpr):
    """A gradient of keys or values, 0 under the mask whatever a visible query holds."""
    return tl.where(keep[:, None], gradient, 0.0) if HAS_MASK else gradient


@triton.jit
def _keys_step(
    dk, dv, k, v, offs_n, keep, start_m, q_base, do_base, o_base, stats_base, gate,
    stride_q, stride_do, stride_o, stride_stats, Lq, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries adds its share to dK and dV."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q, do, m, inverse, delta = _load_queries(
        start_m, offs_m, q_base, do_base, o_base, stats_base, stride_q, stride_do, stride_o,
        stride_stats, Lq, D, BLOCK_D, HAS_MASK,
    )  # fmt: skip
    p, _, ds = _tile(
        q, do, m, inverse, delta, k, v, keep, offs_m, offs_n, gate, scale_log2, CAUSAL,
        NEGATE, PRECISION,
    )  # fmt: skip
    if NEED_V:
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
    if NEED_K:
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _own_keys(
    start_n, q_base, k_base, v_base, do_base, o_base, dk_base, dv_base, stats_base, mask_base, gate,
    stride_q, stride_k, stride_v, stride_do, stride_o, stride_dk, stride_dv, stride_mask,
    stride_stats, Lq, Lk, scale, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys from start_n on."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    keep = kept_keys(mask_base, stride_mask, offs_n, Lk, HAS_MASK, True)
    k = load_rows(k_base, start_n, stride_k, keep, D, BLOCK_D)
    v = load_rows(v_base, start_n, stride_v, keep, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = start_n // BLOCK_M if CAUSAL else 0
    last = Lq // BLOCK_M if TAIL_M > 0 else tl.cdiv(Lq, BLOCK_M)
    for tile in tl.range(first, last, num_stages=NUM_STAGES):
        dk, dv = _keys_step(
            dk, dv, k, v, offs_n, keep, tile * BLOCK_M, q_base, do_base, o_base, stats_base, gate,
            stride_q, stride_do, stride_o, stride_stats, Lq, scale_log2,
            D, BLOCK_M, BLOCK_D, CAUSAL, HAS_MASK, NEED_K, NEED_V, NEGATE, PRECISION,
        )  # fmt: skip
    if TAIL_M > 0:
        dk, dv = _keys_step(
            dk, dv, k, v, offs_n, keep, last * BLOCK_M, q_base, do_base, o_base, stats_base, gate,
            stride_q, stride_do, stride_o, stride_stats, Lq, scale_log2,
            D, TAIL_M, BLOCK_D, CAUSAL, HAS_MASK, NEED_K, NEED_V, NEGATE, PRECISION,
        )  # fmt: skip
    if NEED_K:
        dk = _masked_rows(dk * scale, keep, HAS_MASK)
        store_rows(dk_base, start_n, stride_dk, offs_n < Lk, dk, D, BLOCK_D)
    if NEED_V:
        dv = _masked_rows(dv * gate, keep, HAS_MASK)
        store_rows(dv_base, start_n, stride_dv, offs_n < Lk, dv, D, BLOCK_D)


@triton.jit
def _queries_step(
    dq, row_sum, q, do, m, inverse, delta, offs_m, start_n, k_base, v_base, mask_base, gate,
    stride_k, stride_v, stride_mask, Lk, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, NEED_Q: tl.constexpr, NEED_GATE: tl.constexpr,
    NEGATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys adds its share to dQ, and to the gate's row sum P dP."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    keep = kept_keys(mask_base, stride_mask, offs_n, Lk, HAS_MASK, True)
    k = load_rows(k_base, start_n, stride_k, keep, D, BLOCK_D)
    v = load_rows(v_base, start_n, stride_v, keep, D, BLOCK_D)
    p, dp, ds = _tile(
        q, do, m, inverse, delta, k, v, keep, offs_m, offs_n, gate, scale_log2, CAUSAL,
        NEGATE, PRECISION,
    )  # fmt: skip
    if NEED_GATE:
        row_sum += tl.sum(p * dp, axis=1)
    if NEED_Q:
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, row_sum


@triton.jit
def _own_queries(
    start_m, q_base, k_base, v_base, do_base, o_base, dq_base, stats_base, mask_base, gate,
    dgate_pointer,
    stride_q, stride_k, stride_v, stride_do, stride_o, stride_dq, stride_mask, stride_stats,
    Lq, Lk, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_GATE: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries from start_m on, and their part of the gate's gradient."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q, do, m, inverse, delta = _load_queries(
        start_m, offs_m, q_base, do_base, o_base, stats_base, stride_q, stride_do, stride_o,
        stride_stats, Lq, D, BLOCK_D, HAS_MASK,
    )  # fmt: skip
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    last = Lk // BLOCK_N if TAIL_N > 0 else tl.cdiv(Lk, BLOCK_N)
    if CAUSAL:
        last = tl.minimum(last, tl.cdiv(start_m + BLOCK_M, BLOCK_N))
    for tile in tl.range(0, last, num_stages=NUM_STAGES):
        dq, row_sum = _queries_step(
            dq, row_sum, q, do, m, inverse, delta, offs_m, tile * BLOCK_N, k_base, v_base,
            mask_base, gate, stride_k, stride_v, stride_mask, Lk, scale_log2,
            D, BLOCK_N, BLOCK_D, CAUSAL, HAS_MASK, NEED_Q, NEED_GATE, NEGATE, PRECISION,
        )  # fmt: skip
    if TAIL_N > 0:
        tail = Lk // BLOCK_N * BLOCK_N
        if (not CAUSAL) or (tail < start_m + BLOCK_M):
            dq, row_sum = _queries_step(
                dq, row_sum, q, do, m, inverse, delta, offs_m, tail, k_base, v_base,
                mask_base, gate, stride_k, stride_v, stride_mask, Lk, scale_log2,
                D, TAIL_N, BLOCK_D, CAUSAL, HAS_MASK, NEED_Q, NEED_GATE, NEGATE, PRECISION,
            )  # fmt: skip
    if NEED_Q:
        store_rows(dq_base, start_m, stride_dq, offs_m < Lq, dq * scale, D, BLOCK_D)
    if NEED_GATE:
        tl.store(dgate_pointer, tl.sum(row_sum, axis=0))


@triton.jit
def _own_head(
    q_base, k_base, v_base, do_base, o_base, dq_base, dk_base, dv_base, stats_base, mask_base, gate,
    dgate_pointer,
    stride_q, stride_k, stride_v, stride_do, stride_o, stride_dq, stride_dk, stride_dv,
    stride_mask, stride_stats, Lq, Lk, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr,
    NEED_V: tl.constexpr, NEED_GATE: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Everything at once, where one tile holds all queries and all keys."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    keep = kept_keys(mask_base, stride_mask, offs_n, Lk, HAS_MASK, True)
    k = load_rows(k_base, 0, stride_k, keep, D, BLOCK_D)
    v = load_rows(v_base, 0, stride_v, keep, D, BLOCK_D)
    q, do, m, inverse, delta = _load_queries(
        0, offs_m, q_base, do_base, o_base, stats_base, stride_q, stride_do, stride_o,
        stride_stats, Lq, D, BLOCK_D, HAS_MASK,
    )  # fmt: skip
    p, dp, ds = _tile(
        q, do, m, inverse, delta, k, v, keep, offs_m, offs_n, gate, scale_log2, CAUSAL,
        NEGATE, PRECISION,
    )  # fmt: skip
    if NEED_V:
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        dv = _masked_rows(dv * gate, keep, HAS_MASK)
        store_rows(dv_base, 0, stride_dv, offs_n < Lk, dv, D, BLOCK_D)
    if NEED_GATE:
        tl.store(dgate_pointer, tl.sum(tl.sum(p * dp, axis=1), axis=0))
    ds = ds.to(q.dtype)
    if NEED_K:
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        dk = _masked_rows(dk * scale, keep, HAS_MASK)
        store_rows(dk_base, 0, stride_dk, offs_n < Lk, dk, D, BLOCK_D)
    if NEED_Q:
        dq = tl.dot(ds, k, input_precision=PRECISION)
        store_rows(dq_base, 0, stride_dq, offs_m < Lq, dq * scale, D, BLOCK_D)


@triton.jit
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, o_ptr, dq_ptr, dk_ptr, dv_ptr, stats_ptr, mask_ptr, gate_ptr,
    dgate_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh, stride_dob, stride_dol, stride_doh,
    stride_ob, stride_ol, stride_oh, stride_dqb, stride_dql, stride_dqh,
    stride_dkb, stride_dkl, stride_dkh, stride_dvb, stride_dvl, stride_dvh,
    stride_mb, stride_ml, stride_gb, stride_gh, stride_stats,
    H, Lq, Lk, key_tiles, query_tiles, scale, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_GATE: tl.constexpr, WHOLE: tl.constexpr, NEED_Q: tl.constexpr, NEED_K: tl.constexpr,
    NEED_V: tl.constexpr, NEED_GATE: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Program = (batch, head, tile): first the tiles of keys, then those of queries."""
    per_head = 1 if WHOLE else key_tiles + query_tiles
    pid = tl.program_id(0)
    head = pid // per_head
    tile = pid % per_head
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_base = q_ptr + b * stride_qb + h * stride_qh
    k_base = k_ptr + b * stride_kb + h * stride_kh
    v_base = v_ptr + b * stride_vb + h * stride_vh
    do_base = do_ptr + b * stride_dob + h * stride_doh
    o_base = o_ptr + b * stride_ob + h * stride_oh
    dq_base = dq_ptr + b * stride_dqb + h * stride_dqh if NEED_Q else dq_ptr
    dk_base = dk_ptr + b * stride_dkb + h * stride_dkh if NEED_K else dk_ptr
    dv_base = dv_ptr + b * stride_dvb + h * stride_dvh if NEED_V else dv_ptr
    stats_base = stats_ptr + head.to(tl.int64) * Lq
    mask_base = mask_ptr + b * stride_mb if HAS_MASK else mask_ptr
    gate = tl.load(gate_ptr + b * stride_gb + h * stride_gh).to(tl.float32) if HAS_GATE else 1.0
    if WHOLE:
        _own_head(
            q_base, k_base, v_base, do_base, o_base, dq_base, dk_base, dv_base, stats_base,
            mask_base, gate, dgate_ptr + head,
            stride_ql, stride_kl, stride_vl, stride_dol, stride_ol, stride_dql, stride_dkl,
            stride_dvl, stride_ml, stride_stats, Lq, Lk, scale, scale_log2,
            D, BLOCK_M, BLOCK_N, BLOCK_D, CAUSAL, HAS_MASK, NEED_Q, NEED_K, NEED_V, NEED_GATE,
            NEGATE, PRECISION,
        )  # fmt: skip
    elif tile < key_tiles:
        if TAIL_N > 0 and tile == key_tiles - 1:
            _own_keys(
                tile * BLOCK_N, q_base, k_base, v_base, do_base, o_base, dk_base, dv_base,
                stats_base, mask_base, gate, stride_ql, stride_kl, stride_vl, stride_dol,
                stride_ol, stride_dkl, stride_dvl, stride_ml, stride_stats, Lq, Lk, scale,
                scale_log2, D, TAIL_N, BLOCK_M, TAIL_M, BLOCK_D, CAUSAL, HAS_MASK, NEED_K, NEED_V,
                NEGATE, PRECISION, NUM_STAGES,
            )  # fmt: skip
        else:
            _own_keys(
                tile * BLOCK_N, q_base, k_base, v_base, do_base, o_base, dk_base, dv_base,
                stats_base, mask_base, gate, stride_ql, stride_kl, stride_vl, stride_dol,
                stride_ol, stride_dkl, stride_dvl, stride_ml, stride_stats, Lq, Lk, scale,
                scale_log2, D, BLOCK_N, BLOCK_M, TAIL_M, BLOCK_D, CAUSAL, HAS_MASK, NEED_K, NEED_V,
                NEGATE, PRECISION, NUM_STAGES,
            )  # fmt: skip
    else:
        tile = tile - key_tiles
        dgate_pointer = dgate_ptr + head.to(tl.int64) * query_tiles + tile
        if TAIL_M > 0 and tile == query_tiles - 1:
            _own_queries(
                tile * BLOCK_M, q_base, k_base, v_base, do_base, o_base, dq_base, stats_base,
                mask_base, gate, dgate_pointer, stride_ql, stride_kl, stride_vl, stride_dol,
                stride_ol, stride_dql, stride_ml, stride_stats, Lq, Lk, scale, scale_log2,
                D, TAIL_M, BLOCK_N, TAIL_N, BLOCK_D, CAUSAL, HAS_MASK, NEED_Q, NEED_GATE,
                NEGATE, PRECISION, NUM_STAGES,
            )  # fmt: skip
        else:
            _own_queries(
                tile * BLOCK_M, q_base, k_base, v_base, do_base, o_base, dq_base, stats_base,
                mask_base, gate, dgate_pointer, stride_ql, stride_kl, stride_vl, stride_dol,
                stride_ol, stride_dql, stride_ml, stride_stats, Lq, Lk, scale, scale_log2,
                D, BLOCK_M, BLOCK_N, TAIL_N, BLOCK_D, CAUSAL, HAS_MASK, NEED_Q, NEED_GATE,
                NEGATE, PRECISION, NUM_STAGES,
            )  # fmt: skip


def plan_attention_bwd(
    dout, q, k, v, out, stats, key_mask, head_gate, causal, scale, needs, gradients, tile
):
    """The launch that fills `gradients` (dq, dk, dv), and the gate's partials (B, H, tiles)."""
    dout, q, k, v, out = (near(x) for x in (dout, q, k, v, out))
    b, lq, h, d = q.shape
    lk = k.shape[1]
    need_q, need_k, need_v, need_gate = needs
    block_m, block_n = tile.block_m, tile.block_n
    whole = lq <= block_m and lk <= block_n
    key_tiles = tiles(lk, block_n) if need_k or need_v else 0
    query_tiles = tiles(lq, block_m) if need_q or need_gate else 0
    partials = q.new_empty(b, h, max(query_tiles, 1), dtype=torch.float32)
    dq, dk, dv = gradients
    arguments = {
        **tensor_arguments(q=q, k=k, v=v, do=dout, o=out),
        **tensor_arguments(dq=dq if need_q else q, dk=dk if need_k else k, dv=dv if need_v else v),
        "stats_ptr": stats,
        "stride_stats": stats.stride(0),
        **mask_arguments(key_mask, q),
        **gate_arguments(head_gate, q),
        "dgate_ptr": partials,
        **{"H": h, "Lq": lq, "Lk": lk, "key_tiles": key_tiles, "query_tiles": query_tiles},
        **{"scale": float(scale), **scale_arguments(scale)},
        **{"D": d, "BLOCK_D": block_d(d), "CAUSAL": causal, "WHOLE": whole},
        **{"BLOCK_M": block_m, "TAIL_M": split(lq, block_m)},
        **{"BLOCK_N": block_n, "TAIL_N": split(lk, block_n)},
        **{"NEED_Q": need_q, "NEED_K": need_k, "NEED_V": need_v, "NEED_GATE": need_gate},
        **{"PRECISION": dot_precision(q.dtype), "NUM_STAGES": tile.num_stages},
    }
    programs = b * h * (1 if whole else key_tiles + query_tiles)
    return Launch(_attention_bwd_kernel, programs, arguments, tile.num_warps), partials


def _launch(dout, q, k, v, out, stats, key_mask, head_gate, causal, scale, needs, gradients):
    """Fill `gradients`; -> the gate's gradient, or empty."""
    if not any(needs):
        return q.new_empty(0)
    fixed = (dout, q, k, v, out, stats, key_mask, head_gate, causal, scale, needs, gradients)
    key = kind_of("bwd", q, max(q.shape[1], k.shape[1]), causal)
    tile = choose(key, lambda tile: plan_attention_bwd(*fixed, tile)[0].milliseconds(q))
    launch, partials = plan_attention_bwd(*fixed, tile)
    launch.run(q)
    if not needs[3]:
        return q.new_empty(0)
    axes = (0, 2) if head_gate.dim() == 1 else (2,)
    return partials.sum(dim=axes).to(head_gate.dtype)


def attention_bwd(dout, q, k, v, out, stats, key_mask, head_gate, causal, scale, needs):
    """-> dq (B, Lq, H, D), dk, dv (B, Lk, H, D), dhead_gate; empty where `needs` is False."""
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip((q, k, v), needs, strict=False)
    ]
    dgate = _launch(dout, q, k, v, out, stats, key_mask, head_gate, causal, scale, needs, gradients)
    return *gradients, dgate


def attention_qkv_bwd(dout, qkv, out, stats, key_mask, head_gate, causal, scale, needs):
    """-> dqkv (B, L, 3, H, D), each third written in place, dhead_gate."""
    need_qkv, need_gate = needs
    shape = qkv.shape if need_qkv else (0, 0, 3, 0, 0)
    dqkv = qkv.new_empty(shape)
    needs = [need_qkv] * 3 + [need_gate]
    (q, k, v), gradients = qkv.unbind(2), dqkv.unbind(2)
    dgate = _launch(dout, q, k, v, out, stats, key_mask, head_gate, causal, scale, needs, gradients)
    return dqkv if need_qkv else qkv.new_empty(0), dgate
