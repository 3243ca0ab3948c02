"""One rank that counts the bytes its collectives send: ours, and open_clip's local loss.

    python -m tests.contrastive.traffic STORE RANK WORLD

A ring sends (W - 1) / W of what an all-gather returns, of what a reduce-scatter is given, and twice
that of an all-reduce; an all-to-all sends what it is given for the others. Both losses are counted
by the same rules, on the collectives that they really call.
"""

import sys

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
import torch.nn.functional as F

from tests.contrastive.ranks import WATCHDOG
from tinyclip import ops

WIDTH = 512


class Meter:
    """Bytes that this rank has sent."""

    def __init__(self, world: int):
        self.sent, self.share = 0.0, (world - 1) / world

    def watch(self, name: str, cost) -> None:
        original = getattr(dist, name)

        def counted(*args, **kwargs):
            self.sent += cost(*args)
            return original(*args, **kwargs)

        setattr(dist, name, counted)


def _bytes(tensors) -> int:
    tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    store, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=WATCHDOG
    )
    from open_clip.loss import ClipLoss

    meter = Meter(world)
    meter.watch("all_gather", lambda out, x, *_: meter.share * _bytes(out))
    for name in ("all_gather_into_tensor", "all_gather_single"):  # the second is newer torch's
        if hasattr(dist, name):
            meter.watch(name, lambda out, *_: meter.share * _bytes(out))
    meter.watch("all_reduce", lambda x, *_: 2 * meter.share * _bytes(x))
    meter.watch("all_to_all_single", lambda out, x, *_: meter.share * _bytes(x))
    # open_clip's backward is a reduce-scatter on NCCL. On gloo it is an all-to-all of lists, made
    # of scatters, and a sum: counted as the one all-to-all that it is.
    original = differentiable._AlltoAll.forward

    def all_to_all(ctx, group, out, *tensors):
        meter.sent += meter.share * _bytes(tensors)
        return original(ctx, group, out, *tensors)

    differentiable._AlltoAll.forward = staticmethod(all_to_all)

    def features(rows):
        return [F.normalize(torch.randn(rows, WIDTH), dim=1).requires_grad_() for _ in range(2)]

    def sent(rows, loss) -> float:
        meter.sent = 0.0
        scale = torch.tensor(20.0, requires_grad=True)
        loss(*features(rows), scale).backward()
        return meter.sent

    theirs = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)

    def ours(image, text, scale):
        return ops.contrastive_loss(image, text, scale, group=dist.group.WORLD)

    even = 64
    base = sent(even, theirs)
    # Both of its towers are gathered, and both gradients come back.
    assert base == 4 * meter.share * world * even * WIDTH * 4, base
    uneven = even - 2 * rank  # open_clip cannot: it would pad everyone to the largest
    print(sent(even, ours) / base, sent(uneven, ours) / base)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
