"""The contrastive loss over a process group: every rank works out its own rows of the global S.

One rank's part, of W ranks that hold N rows in all:

    forward   gather text (N D numbers), form the own block of rows once, and reduce the columns'
              statistics over the ranks: maxima by MAX, then what they rescale by SUM
    backward  form the block again; its share of dtext goes to the rows' owners (N D numbers)

Image features never travel. The same calls serve gloo and NCCL: a reduce-scatter of uneven parts is
an all-to-all and a sum in the order of the ranks, which costs the same bytes and rounds the same
way each time.
"""

import struct

import torch
import torch.distributed as dist
from torch import Tensor

from tinyclip.ops._autograd import first_order
from tinyclip.ops._checks import FLOATS
from tinyclip.ops._contracts import implementation
from tinyclip.ops._cross_entropy import cross_entropy

_OP = "contrastive_loss"


def check_group(group: object) -> None:
    """Raise TypeError unless `group` is a process group that this process belongs to."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"{_OP}: group must be None or a torch.distributed.ProcessGroup with this process in"
            f" it, got {type(group).__name__}"
        )


def contrastive_loss(image, text, scale, t_image, t_text, t_scale, alpha, group, backend):
    """The loss of the global batch, the same on every rank. Gradients are W times the rank's share:
    once DDP has averaged over the ranks, those of all parameters are one process's."""
    tensors = (image, text, scale)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    counts, share_dtext = _agree(text, scale.dtype, t_text, alpha, needs, group)
    problem = (image, text, scale, t_image, t_text, t_scale, alpha)
    return _RanksFunction.apply(*problem, group, backend, counts, share_dtext)


_FIELDS = (
    "width D",
    "dtype of text",
    "dtype of the logits, fp64 where image or text is",
    "width of the teacher",
    "dtype of teacher.text",
    "alpha",
)


def _agree(text, work, t_text, alpha, needs, group) -> tuple[list[int], bool]:
    """Rows of every rank, and whether any needs dtext. Raises on all ranks or on none: a problem on
    which they differ would leave some of them waiting for the others."""
    (alpha_bits,) = struct.unpack("<q", struct.pack("<d", alpha))
    teacher = (-1, -1) if t_text is None else (t_text.shape[1], FLOATS.index(t_text.dtype))
    told = [text.shape[0], needs[1], any(needs), text.shape[1]]
    dtypes = [FLOATS.index(dtype) for dtype in (text.dtype, work)]
    mine = torch.tensor([*told, *dtypes, *teacher, alpha_bits], device=text.device)
    everyone = mine.new_empty(dist.get_world_size(group) * mine.numel())
    _all_gather(everyone, mine, group)
    everyone = everyone.view(-1, mine.numel()).tolist()
    for name, *values in zip(_FIELDS, *(ranks[3:] for ranks in everyone), strict=True):
        if len(set(values)) > 1:
            if name == "alpha":
                values = [struct.unpack("<d", struct.pack("<q", value))[0] for value in values]
            elif name.startswith("dtype"):
                values = ["none" if value < 0 else str(FLOATS[value]) for value in values]
            raise ValueError(f"{_OP}: group: all ranks must pass one {name}, got {values}")
    counts = [ranks[0] for ranks in everyone]
    if sum(counts) == 0:
        raise ValueError(f"{_OP}: image must have at least one row on some rank of group, got none")
    share_dtext = any(ranks[1] for ranks in everyone)
    if share_dtext and not all(ranks[2] for ranks in everyone):
        idle = [rank for rank, ranks in enumerate(everyone) if not ranks[2]]
        raise ValueError(
            f"{_OP}: group: text requires grad on some rank, so every rank takes part in backward"
            f" and needs an input that requires grad; ranks {idle} have none"
        )
    return counts, share_dtext


def _all_gather(everyone: Tensor, mine: Tensor, group) -> None:
    """Fill `everyone` with `mine` of all ranks; one of the two names is deprecated in new torch."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, mine, group=group)


def _gather(x: Tensor, counts: list[int], group) -> Tensor:
    """The rows of all ranks, in their order; on the way padded to the most that any has."""
    most = max(counts)
    padded = x.contiguous()
    if x.shape[0] < most:
        padded = x.new_zeros(most, x.shape[1])
        padded[: x.shape[0]] = x
    everyone = x.new_empty(len(counts) * most, x.shape[1])
    _all_gather(everyone, padded, group)
    if min(counts) == most:
        return everyone
    parts = everyone.split(most)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _reduce_columns(cols: Tensor, rows: int, teacher: bool, group) -> Tensor:
    """Statistics of whole columns from those over the rows of each rank."""
    m = cols[0:3:2].clone() if teacher else cols[0:1].clone()
    if rows == 0:
        m.fill_(float("-inf"))
    dist.all_reduce(m, op=dist.ReduceOp.MAX, group=group)
    sums = torch.zeros_like(cols[:3] if teacher else cols[:1])
    if rows > 0:
        sums[0] = torch.exp(cols[0] - m[0]) * cols[1]
        if teacher:
            weight = torch.exp(cols[2] - m[1])
            sums[1] = weight * cols[3]
            sums[2] = weight * (cols[4] + cols[3] * (cols[0] - m[0]))
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    whole = torch.zeros_like(cols)
    whole[0], whole[1] = m[0], sums[0]
    if teacher:
        whole[2], whole[3:] = m[1], sums[1:]
    return whole


def _scatter_sum(partial: Tensor, counts: list[int], rank: int, dtype, group) -> Tensor:
    """The sum over ranks of this rank's rows of `partial` (N, D), at `dtype`."""
    mine = counts[rank]
    received = partial.new_empty(len(counts) * mine, partial.shape[1])
    dist.all_to_all_single(
        received, partial, output_split_sizes=[mine] * len(counts), input_split_sizes=counts,
        group=group,
    )  # fmt: skip
    return received.view(len(counts), mine, partial.shape[1]).sum(dim=0, dtype=dtype)


class _RanksFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, scale, t_image, t_text, t_scale, alpha, group, backend, *agreed):
        counts, ctx.share_dtext = agreed
        rank, mine = dist.get_rank(group), image.shape[0]
        offset, total = sum(counts[:rank]), sum(counts)
        all_text = _gather(text, counts, group)
        all_t_text = None if t_text is None else _gather(t_text, counts, group)
        stats = implementation("contrastive_stats", backend)
        rows, cols, positive = stats(image, all_text, scale, t_image, all_t_text, t_scale, offset)
        cols = _reduce_columns(cols, mine, t_text is not None, group)
        own = cols[:, offset : offset + mine]
        value = cross_entropy(rows, positive, alpha).sum(dtype=torch.float64)
        value = value + cross_entropy(own, positive, alpha).sum(dtype=torch.float64)
        dist.all_reduce(value, op=dist.ReduceOp.SUM, group=group)
        its = (t_image, all_t_text, t_scale)
        ctx.save_for_backward(image, text, all_text, scale, *its, rows, cols)
        ctx.alpha, ctx.group, ctx.backend = alpha, group, backend
        ctx.counts, ctx.rank, ctx.offset, ctx.total = counts, rank, offset, total
        return (0.5 / total * value).to(scale.dtype)

    @staticmethod
    def backward(ctx, dloss):
        image, text, all_text, scale, *its, rows, cols = ctx.saved_tensors
        weight = dloss * (0.5 * len(ctx.counts) / ctx.total)
        needs = list(ctx.needs_input_grad[:3])
        grads = implementation("contrastive_grads", ctx.backend)
        dimage, dtext, dscale = grads(
            *(image, all_text, scale, rows, cols, weight, weight, ctx.alpha),
            *(*its, ctx.offset, [needs[0], ctx.share_dtext, needs[2]]),
        )
        if ctx.share_dtext:
            dtext = _scatter_sum(dtext, ctx.counts, ctx.rank, scale.dtype, ctx.group)
            dtext = dtext.to(all_text.dtype)
        gradients = zip((dimage, dtext, dscale), needs, strict=True)
        gradients = (g if need else None for g, need in gradients)
        return first_order((*gradients, *[None] * 8), dloss, image, text, scale)
