"""``python -m bench.sanitized``: our GPU kernels over edge shapes, for a memory checker to watch.

``python -m bench gpu`` starts it under compute-sanitizer where there is one. It prints how many
launches it made; the checker's exit status is the verdict.
"""

import itertools

import torch

import tinyclip
from tinyclip import ops

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


def main() -> None:
    launches = 0
    with tinyclip.backend("triton"):
        for length, d, dtype in itertools.product(LENGTHS, DIMS, DTYPES):
            launches += attention(length, d, dtype)
    torch.cuda.synchronize()
    print(f"{launches} launches")


if __name__ == "__main__":
    main()
