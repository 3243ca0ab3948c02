"""Attention forward for short rows: main tiles of 64 or 128, and a tail of 16 or 32, both ways.

CLIP's lengths are a multiple of 64 and a little more (77 = 64 + 13, 197 = 192 + 5, 257 = 256 + 1).
A tile of 64 for the little more wastes up to a third of the arithmetic, so the last rows and the
last keys get a narrow tile of their own: 257 x 257 scores cost 272 x 272, 89 % of them useful.

One program owns a (batch, head) and one tile of its queries, and streams the keys past it with an
online softmax; where one tile holds every key, that is the exact single-pass softmax. Programs of
one head are neighbours, so keys and values leave device memory once.

Letters: B batch, L tokens (Lq queries, Lk keys), H heads, D head dim.
"""

import torch
import triton
import triton.language as tl

from .launch import LOG2E, Launch, dot_precision
from .tiling import ragged, split, tiles
from .tuning import choose, kind_of


@triton.jit
def _row_pointers(base, start, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the rows of a tile begin is 64 bit, where an element lies in the tile 32 (`near`)."""
    offsets = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]
    return base + tl.cast(start, tl.int64) * stride + offsets


@triton.jit
def load_rows(base, start, stride, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of a (L, D) head from row start on; zeros where not kept and beyond D."""
    pointers = _row_pointers(base, start, stride, keep.shape[0], BLOCK_D)
    keep = keep[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    return tl.load(pointers, mask=keep, other=0.0)


@triton.jit
def store_rows(base, start, stride, keep, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of load_rows, in the pointer's dtype."""
    pointers = _row_pointers(base, start, stride, keep.shape[0], BLOCK_D)
    keep = keep[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=keep)


@triton.jit
def kept_keys(mask_base, mask_stride, offs_n, Lk, HAS_MASK: tl.constexpr, RAGGED: tl.constexpr):
    """[keys] True where a key exists and may be attended."""
    keep = offs_n < Lk if RAGGED else offs_n >= 0
    if HAS_MASK:
        pointers = mask_base + offs_n.to(tl.int64) * mask_stride
        keep = keep & (tl.load(pointers, mask=keep, other=0) != 0)
    return keep


@triton.jit
def scores(q, k, NEGATE: tl.constexpr, PRECISION: tl.constexpr):
    """[M, N] q kT, without the scale: it multiplies differences only, which rounds less."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    return -s if NEGATE else s


@triton.jit
def _attend_tile(
    q, m, l, acc, offs_m, start_n, k_base, v_base, mask_base,  # noqa: E741
    stride_k, stride_v, stride_mask, Lk, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, RAGGED: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: fold it into the running maximum m, sum l and output acc."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    keep = kept_keys(mask_base, stride_mask, offs_n, Lk, HAS_MASK, RAGGED)
    k = load_rows(k_base, start_n, stride_k, keep, D, BLOCK_D)
    s = scores(q, k, NEGATE, PRECISION)
    if HAS_MASK or RAGGED:
        s = tl.where(keep[None, :], s, float("-inf"))
    if CAUSAL:
        s = tl.where(offs_m[:, None] >= offs_n[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1))
    # A row that has seen no key has m = -inf; subtracting 0 instead keeps its p at 0, not NaN.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2((s - m_safe[:, None]) * scale_log2)
    rescale = tl.exp2((m - m_safe) * scale_log2)
    l = l * rescale + tl.sum(p, axis=1)  # noqa: E741
    v = load_rows(v_base, start_n, stride_v, keep, D, BLOCK_D)
    acc = acc * rescale[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return m_new, l, acc


@triton.jit
def _attend_rows(
    start_m, q_base, k_base, v_base, out_base, stats_base, mask_base, gate,
    stride_q, stride_k, stride_v, stride_out, stride_mask, stride_stats, Lq, Lk, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, RAGGED_N: tl.constexpr,
    NEGATE: tl.constexpr, PRECISION: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries from start_m on: every key past them, then out and stats."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    in_rows = offs_m < Lq
    q = load_rows(q_base, start_m, stride_q, in_rows, D, BLOCK_D)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tiles = tl.cdiv(Lk, BLOCK_N) if RAGGED_N else Lk // BLOCK_N
    if CAUSAL:
        tiles = tl.minimum(tiles, tl.cdiv(start_m + BLOCK_M, BLOCK_N))
    for tile in tl.range(0, tiles, num_stages=NUM_STAGES):
        m, l, acc = _attend_tile(  # noqa: E741
            q, m, l, acc, offs_m, tile * BLOCK_N, k_base, v_base, mask_base,
            stride_k, stride_v, stride_mask, Lk, scale_log2,
            D, BLOCK_N, BLOCK_D, CAUSAL, HAS_MASK, RAGGED_N, NEGATE, PRECISION,
        )  # fmt: skip
    if TAIL_N > 0:
        tail = Lk // BLOCK_N * BLOCK_N
        # A run-time condition also where it always holds. Without the branch the tail's products
        # share a block with the end of the pipelined loop, and ptxas serializes the loop's wgmma
        # (warning C7515): each of them is waited for.
        if tail < (start_m + BLOCK_M if CAUSAL else Lk):
            m, l, acc = _attend_tile(  # noqa: E741
                q, m, l, acc, offs_m, tail, k_base, v_base, mask_base,
                stride_k, stride_v, stride_mask, Lk, scale_log2,
                D, TAIL_N, BLOCK_D, CAUSAL, HAS_MASK, True, NEGATE, PRECISION,
            )  # fmt: skip
    acc = acc * (gate / tl.where(l == 0.0, 1.0, l))[:, None]
    store_rows(out_base, start_m, stride_out, in_rows, acc, D, BLOCK_D)
    tl.store(stats_base + offs_m, m, mask=in_rows)
    tl.store(stats_base + stride_stats + offs_m, l, mask=in_rows)


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, stats_ptr, mask_ptr, gate_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh,
    stride_vb, stride_vl, stride_vh, stride_ob, stride_ol, stride_oh,
    stride_mb, stride_ml, stride_gb, stride_gh, stride_stats,
    H, Lq, Lk, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_GATE: tl.constexpr, RAGGED_N: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Program = (batch, head, tile of queries); the last tile of a head is TAIL_M rows if any."""
    main_tiles = Lq // BLOCK_M if TAIL_M > 0 else tl.cdiv(Lq, BLOCK_M)
    tiles = main_tiles + 1 if TAIL_M > 0 else main_tiles
    pid = tl.program_id(0)
    head = pid // tiles
    tile = pid % tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_base = q_ptr + b * stride_qb + h * stride_qh
    k_base = k_ptr + b * stride_kb + h * stride_kh
    v_base = v_ptr + b * stride_vb + h * stride_vh
    out_base = o_ptr + b * stride_ob + h * stride_oh
    stats_base = stats_ptr + head.to(tl.int64) * Lq
    mask_base = mask_ptr + b * stride_mb if HAS_MASK else mask_ptr
    gate = tl.load(gate_ptr + b * stride_gb + h * stride_gh).to(tl.float32) if HAS_GATE else 1.0
    if TAIL_M > 0 and tile == main_tiles:
        _attend_rows(
            tile * BLOCK_M, q_base, k_base, v_base, out_base, stats_base, mask_base, gate,
            stride_ql, stride_kl, stride_vl, stride_ol, stride_ml, stride_stats, Lq, Lk, scale_log2,
            D, TAIL_M, BLOCK_N, TAIL_N, BLOCK_D, CAUSAL, HAS_MASK, RAGGED_N, NEGATE, PRECISION,
            NUM_STAGES,
        )  # fmt: skip
    else:
        _attend_rows(
            tile * BLOCK_M, q_base, k_base, v_base, out_base, stats_base, mask_base, gate,
            stride_ql, stride_kl, stride_vl, stride_ol, stride_ml, stride_stats, Lq, Lk, scale_log2,
            D, BLOCK_M, BLOCK_N, TAIL_N, BLOCK_D, CAUSAL, HAS_MASK, RAGGED_N, NEGATE, PRECISION,
            NUM_STAGES,
        )  # fmt: skip


def block_d(d: int) -> int:
    """The power of two that holds a head dim; tl.dot wants at least 16."""
    return max(16, triton.next_power_of_2(d))


def near(x: torch.Tensor) -> torch.Tensor:
    """x, copied if its rows lie so far apart that a tile of them leaves 32-bit offsets, or if the
    elements of one are not adjacent."""
    adjacent = x.shape[3] == 1 or x.stride(3) == 1
    return x if adjacent and x.stride(1) < 2**31 // 256 else x.contiguous()


def tensor_arguments(**tensors) -> dict:
    """Pointers and strides of (B, L, H, D) tensors, named as the kernels name them."""
    arguments = {}
    for name, x in tensors.items():
        arguments[f"{name}_ptr"] = x
        for letter, stride in zip("blh", x.stride(), strict=False):
            arguments[f"stride_{name}{letter}"] = stride
    return arguments


def mask_arguments(key_mask, like) -> dict:
    """The key mask as bytes; without one, any pointer, never read."""
    mask = like if key_mask is None else key_mask.view(torch.uint8)
    strides = (0, 0) if key_mask is None else mask.stride()
    return {
        "mask_ptr": mask,
        "stride_mb": strides[0],
        "stride_ml": strides[1],
        "HAS_MASK": key_mask is not None,
    }


def gate_arguments(head_gate, like) -> dict:
    """A gate of (H,) is one of (B, H) whose batch stride is 0."""
    strides = (0, 0) if head_gate is None else ((0,) * (2 - head_gate.dim()) + head_gate.stride())
    return {
        "gate_ptr": like if head_gate is None else head_gate,
        "stride_gb": strides[0],
        "stride_gh": strides[1],
        "HAS_GATE": head_gate is not None,
    }


def scale_arguments(scale) -> dict:
    """The scale's size in log2 units, and its sign; 0 is close to 0, for a masked -inf to stay."""
    return {"scale_log2": max(abs(float(scale)) * LOG2E, 1e-30), "NEGATE": float(scale) < 0}


def plan_attention_fwd(q, k, v, out, stats, key_mask, head_gate, causal, scale, tile):
    """The launch that fills out (B, Lq, H, D) and stats (2, B, H, Lq)."""
    q, k, v = near(q), near(k), near(v)
    b, lq, h, d = q.shape
    lk = k.shape[1]
    block_m, block_n = tile.block_m, tile.block_n
    arguments = {
        **tensor_arguments(q=q, k=k, v=v, o=out),
        "stats_ptr": stats,
        "stride_stats": stats.stride(0),
        **mask_arguments(key_mask, q),
        **gate_arguments(head_gate, q),
        **{"H": h, "Lq": lq, "Lk": lk, **scale_arguments(scale)},
        **{"D": d, "BLOCK_D": block_d(d), "CAUSAL": causal},
        **{"BLOCK_M": block_m, "TAIL_M": split(lq, block_m)},
        **{"BLOCK_N": block_n, "TAIL_N": split(lk, block_n), "RAGGED_N": ragged(lk, block_n)},
        **{"PRECISION": dot_precision(q.dtype), "NUM_STAGES": tile.num_stages},
    }
    return Launch(_attention_fwd_kernel, b * h * tiles(lq, block_m), arguments, tile.num_warps)


def attention_fwd(q, k, v, key_mask, head_gate, causal, scale):
    """-> out (B, Lq, H, D), stats (2, B, H, Lq): the maximum of each row's scores and its sum.

    Two numbers and not their lse: at scores of 1e4 the sum of the two rounds the small one away.
    """
    b, lq, h, _ = q.shape
    out = q.new_empty(q.shape)
    stats = q.new_empty(2, b, h, lq, dtype=torch.float32)

    def plan(tile):
        return plan_attention_fwd(q, k, v, out, stats, key_mask, head_gate, causal, scale, tile)

    key = kind_of("fwd", q, max(lq, k.shape[1]), causal)
    plan(choose(key, lambda tile: plan(tile).milliseconds(q))).run(q)
    return out, stats
