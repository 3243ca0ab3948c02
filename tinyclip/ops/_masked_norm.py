"""LayerNorm over the kept channels on a CPU, in blocks of rows that stay in the cache.

There is no built-in for it. Written as whole-tensor operations it is some twenty passes over
memory; here the passes are over a block, in place, and only x, y and the gradients travel. No size
depends on the mask, so nothing waits and nothing recompiles.

Letters: R rows, C channels.
"""

import torch
from torch import Tensor

_BLOCK = 1 << 17  # elements a thread: 512 KiB of fp32, three such buffers in an L2 cache


def _blocks(rows: int, channels: int):
    """Slices of rows."""
    step = max(1, _BLOCK * torch.get_num_threads() // max(1, channels))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _channels(mask, weight, bias, dtype):
    """The mask as numbers, 1 / how many are kept, weight and bias with zeros where masked."""
    kept = mask.to(dtype)
    inverse = 1 / kept.sum().clamp(min=1)
    weight = kept if weight is None else weight.to(dtype).masked_fill(~mask, 0)
    bias = None if bias is None else bias.to(dtype).masked_fill(~mask, 0)
    return kept, inverse, weight, bias


def _bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Every bit of a kept channel and none of a masked one: six times as fast as masked_fill."""
    return -mask.to(torch.int32 if dtype == torch.float32 else torch.int64)


def _load(x: Tensor, bits: Tensor, into: Tensor) -> Tensor:
    """Rows of x in the working dtype, with zeros where masked, whatever lies there."""
    rows = into[: x.shape[0]].copy_(x)
    rows.view(bits.dtype).bitwise_and_(bits)
    return rows


@torch.no_grad()
def forward(total: Tensor, weight, bias, mask: Tensor, eps: float, out_dtype: torch.dtype):
    """total (R, C) -> y (R, C), mean (R,), rstd (R,)."""
    rows, channels = total.shape
    acc = torch.promote_types(total.dtype, torch.float32)
    kept, inverse, weight, bias = _channels(mask, weight, bias, acc)
    bits = _bits(mask, acc)
    y = total.new_empty(total.shape, dtype=out_dtype)
    mean, rstd = (total.new_empty(rows, 1, dtype=acc) for _ in range(2))
    blocks = _blocks(rows, channels)
    buffer = total.new_empty(blocks[0].stop if blocks else 0, channels, dtype=acc)
    for block in blocks:
        s = _load(total[block], bits, buffer)
        m = torch.sum(s, -1, keepdim=True, out=mean[block]).mul_(inverse)
        s.addcmul_(m, kept, value=-1)
        r = torch.linalg.vector_norm(s, dim=-1, keepdim=True, out=rstd[block])
        s.mul_(r.square_().mul_(inverse).add_(eps).rsqrt_())
        out = y[block] if out_dtype == acc else s
        if bias is None:
            torch.mul(s, weight, out=out)
        else:
            torch.addcmul(bias, s, weight, out=out)
        if out is s:
            y[block] = s
    return y, mean.squeeze(-1), rstd.squeeze(-1)


@torch.no_grad()
def backward(dy, dtotal, total, mean, rstd, weight, mask, needs):
    """-> dx (R, C) in total's dtype, dweight, dbias (C,) in the working one; None if not needed."""
    need_x, need_weight, need_bias = needs
    rows, channels = total.shape
    acc = mean.dtype
    kept, inverse, weight, _ = _channels(mask, weight, None, acc)
    bits = _bits(mask, acc)
    dx = total.new_empty(total.shape) if need_x else None
    dweight, dbias = (
        total.new_zeros(channels, dtype=acc) if need else None for need in (need_weight, need_bias)
    )
    blocks = _blocks(rows, channels)
    buffers = total.new_empty(3, blocks[0].stop if blocks else 0, channels, dtype=acc)
    for block in blocks:
        g = _load(dy[block], bits, buffers[0])
        if need_bias:
            dbias += g.sum(0)
        if not (need_x or need_weight):
            continue
        n, r = _load(total[block], bits, buffers[1]), rstd[block, None]
        n.addcmul_(mean[block, None], kept, value=-1).mul_(r)
        product = torch.mul(g, n, out=buffers[2][: len(g)])
        if need_weight:
            dweight += product.sum(0)
        if not need_x:
            continue
        mean_dn = product.mul_(weight).sum(-1, keepdim=True).mul_(inverse)
        d = g.mul_(weight)
        mean_d = d.sum(-1, keepdim=True).mul_(inverse)
        d.addcmul_(n, mean_dn, value=-1).addcmul_(mean_d, kept, value=-1).mul_(r)
        if dtotal is not None:
            d.add_(dtotal[block])
        dx[block] = d
    return dx, dweight, dbias
