"""Inputs on the device and calls of the ops, as several of the GPU tests make them."""

import torch
import torch.nn.functional as F

import tinyclip
from tinyclip import ops


def features(count, m, d, dtype=torch.bfloat16, seed=0):
    """That many (m, d) tensors of unit rows, each a leaf."""
    generator = torch.Generator("cuda").manual_seed(seed)
    for _ in range(count):
        x = torch.randn(m, d, device="cuda", generator=generator)
        yield F.normalize(x, dim=1).to(dtype).requires_grad_()


def gradients(backend, image, text, scale, **options):
    """Loss, dimage, dtext, dscale."""
    scale = torch.tensor(scale, device="cuda", requires_grad=True)
    with tinyclip.backend(backend):
        value = ops.contrastive_loss(image, text, scale, **options)
        return value.detach(), *torch.autograd.grad(value, (image, text, scale))


def mlp_leaves(rows, c, f, dtype):
    """x (rows, c) and both layers of f hidden channels."""
    shapes = ((rows, c), (f, c), (f,), (c, f), (c,))
    return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]
