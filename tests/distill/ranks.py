"""One rank of the distributed test of affinity mimicking, started W times.

    python -m tests.distill.ranks STORE RANK WORLD

Every rank knows the whole global batch, takes its rows of it through a student under DDP and a
teacher of its own, and must find the loss, the terms and the gradients of one process.
"""

import datetime
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.models import build
from tinyclip.distill import AffinityMimicking

VISION = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
TEXT = {"context_length": 6, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
STUDENT = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
TEACHER = {"embed_dim": 20, "vision_cfg": {**VISION, "width": 24}, "text_cfg": TEXT}
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def step(model, objective, image, text, group):
    terms = objective(*model(image, text), (image, text), group)
    terms["loss"].backward()
    return {name: value.detach() for name, value in terms.items()}


def main() -> None:
    store, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    counts = (5, 3)[:world]
    begin, total = sum(counts[:rank]), sum(counts)
    image = torch.randn(total, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    text = build.captions(30, 6, total)
    mine = slice(begin, begin + counts[rank])
    for alpha, scale in ((1.0, None), (0.3, None), (0.7, 50.0), (0.0, None)):
        teacher = build.model(TEACHER, seed=2).double()
        objective = AffinityMimicking(teacher, alpha=alpha, teacher_scale=scale)
        alone = build.model(STUDENT, seed=1).double()
        wanted = step(alone, objective, image, text, None)
        model = build.model(STUDENT, seed=1).double()
        parallel = DistributedDataParallel(model)
        found = step(parallel, objective, image[mine], text[mine], dist.group.WORLD)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, **EXACT)
        for ours, truth in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, truth.grad, **EXACT)
        assert all(parameter.grad is None for parameter in teacher.parameters())
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} of {world}: agrees")


if __name__ == "__main__":
    main()
