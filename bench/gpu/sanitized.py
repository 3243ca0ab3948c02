"""``python -m bench.gpu.sanitized``: our GPU kernels over edge shapes, for a checker to watch.

``python -m bench gpu`` starts it under compute-sanitizer where there is one, after a test has
compiled the same kernels outside the checker's clock. Under it everything is many times slower, so
it is a few shapes that reach every branch: tails of tiles, masks, gates, ragged widths, one row. It
says after every problem how many launches it has made; the checker's exit status is the verdict.
"""

from collections.abc import Iterator

import torch

import tinyclip
from tinyclip import ops
from tinyclip.triton_kernels import gelu_mlp

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (length, head dim, dtype): tails of 16 and of 1, a head dim that is no power of two, one row.
ATTENTION = ((257, 64, BF16), (77, 40, FP16), (1, 16, FP32))
MLP = ((197, 100, BF16), (77, 21, FP32), (1, 256, FP16))  # (rows, channels, dtype)
CONTRASTIVE = ((300, 72, BF16), (127, 500, FP32), (1, 8, FP16))  # (rows, width, dtype)
FAMILIES = ("cuda", "triton", "attention", "mlp_and_norm")


def attention(length: int, d: int, dtype: torch.dtype) -> int:
    """Forward and backward of packed attention with a mask and a gate, causal, and of separate q,
    k and v of two lengths; the launches made."""
    qkv = torch.randn(2, length, 3, 3, d, device="cuda", dtype=dtype, requires_grad=True)
    mask = torch.rand(2, length, device="cuda") > 0.3
    gate = torch.randn(3, device="cuda", requires_grad=True)
    out = ops.attention_qkv(qkv, causal=True, key_mask=mask, head_gate=gate)
    out.float().sum().backward()
    q = torch.randn(2, length + 3, 3, d, device="cuda", dtype=dtype, requires_grad=True)
    k, v = qkv.detach()[:, :, 1], qkv.detach()[:, :, 2]
    ops.attention(q, k, v).float().sum().backward()
    return 4


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


def family(name: str) -> Iterator[int]:
    """Run one of FAMILIES; the launches of each problem as it ends, none where it cannot run."""
    problems = {"attention": ATTENTION, "mlp_and_norm": MLP}.get(name, CONTRASTIVE)
    run = {"attention": attention, "mlp_and_norm": mlp_and_norm}.get(name, contrastive)
    backend = name if run is contrastive else "triton"
    if run is contrastive:
        rows = tinyclip.explain("contrastive_loss").rows
        if any(row[:2] == (backend, "cannot") for row in rows):
            return
    for problem in problems:
        with tinyclip.backend(backend):
            launches = run(*problem)
        torch.cuda.synchronize()
        yield launches


def main() -> None:
    total = 0
    for name in FAMILIES:
        print(name, flush=True)
        for launches in family(name):
            total += launches
            print(f"{total} launches", flush=True)


if __name__ == "__main__":
    main()
