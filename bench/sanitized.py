"""``python -m bench.sanitized``: our GPU kernels over edge shapes, for a memory checker to watch.

``python -m bench gpu`` starts it under compute-sanitizer where there is one. It prints how many
launches it made; the checker's exit status is the verdict.
"""

import itertools

import torch

import tinyclip
from tinyclip import ops
from tinyclip.triton_kernels import gelu_mlp

LENGTHS = (1, 17, 50, 64, 77, 97, 197, 257)
DIMS = (16, 40, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def attention(length: int, d: int, dtype: torch.dtype) -> int:
    """Forward and backward of packed, masked, gated and causal attention; the launches made."""
    qkv = torch.randn(2, length, 3, 3, d, device="cuda", dtype=dtype, requires_grad=True)
    mask = torch.rand(2, length, device="cuda") > 0.3
    gate = torch.randn(3, device="cuda", requires_grad=True)
    for causal in (False, True):
        out = ops.attention_qkv(qkv, causal=causal, key_mask=mask, head_gate=gate)
        out.float().sum().backward()
    q = torch.randn(2, length + 3, 3, d, device="cuda", dtype=dtype, requires_grad=True)
    k, v = qkv.detach()[:, :, 1], qkv.detach()[:, :, 2]
    ops.attention(q, k, v).float().sum().backward()
    return 6


def mlp_and_norm(rows: int, c: int, dtype: torch.dtype) -> int:
    """Both implementations of the gated MLP, and the masked norm of a sum; the launches made."""
    shapes = ((rows, c), (3 * c, c), (3 * c,), (c, 3 * c), (c,), (3 * c,))
    *tensors, gate = (
        torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes
    )
    for implementation in gelu_mlp.IMPLEMENTATIONS:
        with gelu_mlp.only(implementation):
            ops.gelu_mlp(*tensors, hidden_gate=gate).float().sum().backward()
    x, _, _, _, bias = tensors
    mask = torch.rand(c, device="cuda") > 0.3
    y, total = ops.layer_norm(x, bias, bias, residual=x, channel_mask=mask)
    (y + total).float().sum().backward()
    return 6


def contrastive(m: int, d: int, dtype: torch.dtype) -> int:
    """Forward and backward of the loss, without a teacher and with one; the launches made."""
    image, text = (
        torch.randn(m, d, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)
    )
    teacher = torch.randn(2, m, d + 3, device="cuda", dtype=dtype)
    ops.contrastive_loss(image, text, 0.1).backward()
    teacher = tinyclip.Teacher(*teacher, 0.1)
    ops.contrastive_loss(image, text, 0.1, teacher=teacher, alpha=0.5).backward()
    return 8


def main() -> None:
    launches = 0
    for backend in ("cuda", "triton"):
        rows = tinyclip.explain("contrastive_loss").rows
        if any(row[:2] == (backend, "cannot") for row in rows):
            print(f"contrastive on {backend}: not run")
            continue
        with tinyclip.backend(backend):
            for m, d, dtype in itertools.product((1, 127, 300), (8, 72, 500), DTYPES):
                launches += contrastive(m, d, dtype)
    with tinyclip.backend("triton"):
        for length, d, dtype in itertools.product(LENGTHS, DIMS, DTYPES):
            launches += attention(length, d, dtype)
        for rows, c, dtype in itertools.product(LENGTHS, (21, 100, 256), DTYPES):
            launches += mlp_and_norm(rows, c, dtype)
    torch.cuda.synchronize()
    print(f"{launches} launches")


if __name__ == "__main__":
    main()
