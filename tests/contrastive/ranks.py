"""One rank of the distributed tests: started W times, it compares itself with one process.

    python -m tests.contrastive.ranks STORE RANK WORLD

Every rank knows the whole global batch, takes its rows of it through a small tower under DDP, and
must find the gradients that the whole batch gives one process.
"""

import contextlib
import datetime
import itertools
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tinyclip
from tinyclip import ops

WATCHDOG = datetime.timedelta(seconds=60)
EXACT = 1e-12
# Rows of each rank, cut to W of them: even, uneven, a rank with one row, ranks with none.
SPLITS = ((4, 4, 4, 4), (5, 2, 7, 3), (1, 6, 2, 4), (0, 5, 3, 0), (6, 0, 0, 2))
ALPHAS = (0.0, 0.5, 1.0)


class Towers(nn.Module):
    """Two linear towers and a logit scale: parameters for DDP to average."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.image, self.text = nn.Linear(5, width), nn.Linear(4, width)
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, image, text):
        image, text = F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1)
        return image, text, self.log_scale.exp()


def batch(rows: int, seed: int) -> dict[str, Tensor]:
    """The global batch, the teacher's features of it included."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"image": 5, "text": 4, "t_image": 3, "t_text": 3}
    return {
        name: torch.randn(rows, width, generator=generator, dtype=torch.float64)
        for name, width in widths.items()
    }


def loss_of(model, data: dict[str, Tensor], alpha: float, group) -> Tensor:
    teacher = tinyclip.Teacher(data["t_image"], data["t_text"], 3.0)
    return ops.contrastive_loss(
        *model(data["image"], data["text"]), teacher=teacher, alpha=alpha, group=group
    )


def same(name: str, found: Tensor, wanted: Tensor) -> float:
    error = (found.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
    if not error <= EXACT * max(1.0, wanted.abs().max().item() if wanted.numel() else 1.0):
        raise AssertionError(f"{name} is off by {error}")
    return error


def parameters_agree(rank: int, world: int, group) -> float:
    """DDP-averaged gradients of every parameter, and the loss, against one process."""
    worst = 0.0
    for (split, alpha), backend in itertools.product(
        itertools.product(SPLITS, ALPHAS), ("cpu", "torch", "reference")
    ):
        counts = split[:world]
        if sum(counts) == 0:
            continue
        torch.manual_seed(3)
        model = Towers().double()
        data = batch(sum(counts), seed=len(split) + sum(counts))
        with tinyclip.backend("reference"):
            wanted_loss = loss_of(model, data, alpha, None)
            wanted = torch.autograd.grad(wanted_loss, list(model.parameters()))
        begin = sum(counts[:rank])
        mine = {name: x[begin : begin + counts[rank]] for name, x in data.items()}
        parallel = DistributedDataParallel(model, process_group=group)
        with tinyclip.backend(backend):
            value = loss_of(parallel, mine, alpha, group)
            value.backward()
        worst = max(worst, same("loss", value.detach(), wanted_loss.detach()))
        for (name, parameter), truth in zip(model.named_parameters(), wanted, strict=True):
            label = f"{name} of {counts}, alpha {alpha}, {backend}"
            worst = max(worst, same(label, parameter.grad, truth))
    return worst


def features_agree(rank: int, world: int, group) -> None:
    """Feature gradients are W times the rank's share, whatever the strides and what is frozen."""
    counts = (3, 0, 4, 2)[:world]
    begin, total = sum(counts[:rank]), sum(counts)
    whole = torch.randn(2, total, 12, generator=torch.Generator().manual_seed(5)).double()
    whole = [F.normalize(x, dim=1).requires_grad_() for x in whole]
    with tinyclip.backend("reference"):
        wanted = torch.autograd.grad(ops.contrastive_loss(*whole, 20.0), whole)
    for layout, frozen in itertools.product(("contiguous", "transposed", "wide"), (None, 0, 1)):
        mine = []
        for x in whole:
            x = x.detach()[begin : begin + counts[rank]]
            if layout == "transposed":
                x = x.T.contiguous().T
            if layout == "wide":
                x = torch.stack([x, x], dim=2)[:, :, 0]
            mine.append(x.requires_grad_(len(mine) != frozen))
        scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
        ops.contrastive_loss(*mine, scale, group=group).backward()
        for i, (x, truth) in enumerate(zip(mine, wanted, strict=True)):
            if i == frozen:
                assert x.grad is None
            else:
                same(f"feature {i} {layout}", x.grad, world * truth[begin : begin + counts[rank]])


@contextlib.contextmanager
def raises(kind, sentence: str):
    try:
        yield
    except kind as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(f"nothing raised, expected {sentence!r}")


def wrong_calls_raise_everywhere(rank: int, world: int, group) -> None:
    """On all ranks or on none: a rank that raised alone would leave the others waiting."""
    empty, x = torch.randn(0, 4), torch.randn(2, 4)
    with raises(ValueError, "at least one row on some rank"):
        ops.contrastive_loss(empty, empty, 3.0, group=group)
    with raises(TypeError, "group must be None or a torch.distributed.ProcessGroup"):
        ops.contrastive_loss(x, x, 3.0, group="gloo")
    if world == 1:
        return
    width = 4 if rank else 5
    with raises(ValueError, "all ranks must pass one width D"):
        ops.contrastive_loss(torch.randn(2, width), torch.randn(2, width), 3.0, group=group)
    teacher = tinyclip.Teacher(x, x, 2.0)
    with raises(ValueError, "all ranks must pass one alpha, got"):
        ops.contrastive_loss(x, x, 3.0, teacher=teacher, alpha=0.25 + rank / 10, group=group)
    with raises(ValueError, "all ranks must pass one dtype of text"):
        odd = x.double() if rank else x
        ops.contrastive_loss(odd, odd, 3.0, group=group)
    with raises(ValueError, "all ranks must pass one dtype of the logits"):
        ops.contrastive_loss(x.double() if rank else x, x, 3.0, group=group)
    with raises(ValueError, "every rank takes part in backward"):
        ops.contrastive_loss(x, x.clone().requires_grad_(rank == 0), 3.0, group=group)
    alone = dist.new_group([0])
    if rank:
        with raises(TypeError, "group must be None"):
            ops.contrastive_loss(x, x, 3.0, group=alone)


def the_16_bit_types_agree(rank: int, world: int, group) -> None:
    """bf16 and fp16 travel as they are; the loss is that of one process to fp32."""
    for dtype in (torch.bfloat16, torch.float16):
        x, y = F.normalize(torch.ones(2, 3 * world, 8).cumsum(1).cos(), dim=2).to(dtype)
        mine = slice(3 * rank, 3 * rank + 3)
        image, text = (z[mine].clone().requires_grad_() for z in (x, y))
        value = ops.contrastive_loss(image, text, 10.0, group=group)
        value.backward()
        torch.testing.assert_close(value.detach(), ops.contrastive_loss(x, y, 10.0))
        assert value.dtype == torch.float32
        assert image.grad.dtype == text.grad.dtype == dtype


def main() -> None:
    store, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=WATCHDOG
    )
    group = dist.group.WORLD
    worst = parameters_agree(rank, world, group)
    features_agree(rank, world, group)
    wrong_calls_raise_everywhere(rank, world, group)
    the_16_bit_types_agree(rank, world, group)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} of {world}: worst difference {worst:.1e}")


if __name__ == "__main__":
    main()
