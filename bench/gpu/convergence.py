"""``python -m bench.gpu.convergence DEVICE CURVE``: compare 200 training steps with PyTorch's ops.

Trains one small CLIP on scanned digits with AdamW, once with backend `auto` and once with `torch`,
on the same batches. CURVE is "clip fp32", "clip bf16", "affinity fp32" or "affinity bf16"; the
latter two have a teacher. The largest relative difference of the losses must stay within a bound.
In fp32 that is twice the difference between the backends `torch` and `reference`, at least 1e-5:
two PyTorch runs with different rounding drift apart by 8e-5 in 200 steps of AdamW. In bf16 it is
the difference between two `torch` runs with different data orders. The last line printed is JSON:
the difference, its bound, and every tenth loss. The exit status is 1 if the bound is exceeded.
"""

import argparse
import json
import sys

import torch

import tinyclip
from tinyclip import ops
from tinyclip.data import Loader, Reader, open_data
from tinyclip.data.digits import CONTEXT_LENGTH, PREPROCESS, vocabulary
from tinyclip.models import CLIP, Preprocess, Tokenizer, create_model

_TOWER = {"layers": 2, "width": 128}
_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": [16, 32], "patch_size": 8, "head_width": 64, **_TOWER},
    "text_cfg": {"context_length": 16, "vocab_size": 558, "heads": 2, **_TOWER},
}
_BATCH, _LR, _WARMUP = 256, 1e-3, 20
_TEACHER_SCALE = 50.0
CURVES = ("clip fp32", "clip bf16", "affinity fp32", "affinity bf16")
# Relative difference of fp32 losses that is never a failure.
_FLOOR = 1e-5


def batches(steps: int, seed: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The first `steps` batches of an epoch's order."""
    reader = Reader(Preprocess(**PREPROCESS), Tokenizer(*vocabulary(), CONTEXT_LENGTH))
    loader = Loader(open_data("digits:train"), reader, batch_size=_BATCH, seed=seed)
    found: list = []
    for batch in loader.epoch(0):
        found.append(tuple(x.to(device) for x in batch.pairs[0]))
        if len(found) == steps:
            break
    return found


def model(seed: int, device: str) -> CLIP:
    """A CLIP with new weights, the same on every device."""
    torch.manual_seed(seed)
    return create_model(_CONFIG).to(device)


def losses(
    data: list, backend: str, dtype: torch.dtype, teacher: CLIP | None, seed: int, device: str
) -> list[float]:
    """The loss of each step."""
    student = model(seed, device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=_LR, weight_decay=0.1)
    found = []
    with tinyclip.backend(backend):
        for step, (image, text) in enumerate(data):
            optimizer.param_groups[0]["lr"] = _LR * min(1.0, (step + 1) / _WARMUP)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                target = None
                if teacher is not None:
                    with torch.no_grad():
                        target = ops.Teacher(*teacher(image, text)[:2], _TEACHER_SCALE)
                features = student(image, text)
                alpha = 0.0 if teacher is None else 0.5
                loss = ops.contrastive_loss(*features, teacher=target, alpha=alpha)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
    return torch.stack(found).double().tolist()


def difference(ours: list[float], other: list[float]) -> float:
    """The largest relative difference of two curves; infinite where one is not finite."""
    ours, other = torch.tensor(ours), torch.tensor(other)
    if not (ours.isfinite().all() and other.isfinite().all()):
        return float("inf")
    return ((ours - other).abs() / other.abs()).max().item()


def compare(curve: str, steps: int, device: str) -> dict:
    """{max_difference, bound, ours, eager: every tenth loss} of "clip fp32" and its like."""
    torch.set_float32_matmul_precision("highest")
    objective, name = curve.split()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    fixed = (dtype, model(9, device).eval() if objective == "affinity" else None)
    data = batches(steps, 0, device)
    ours, eager = (losses(data, backend, *fixed, 0, device) for backend in ("auto", "torch"))
    if dtype == torch.float32:
        near = losses(data, "reference", *fixed, 0, device)
        bound = max(_FLOOR, 2 * difference(near, eager))
    else:
        bound = difference(losses(batches(steps, 1, device), "torch", *fixed, 0, device), eager)
    every = {"ours": ours[::10], "eager": eager[::10]}
    every = {side: [round(loss, 5) for loss in curve] for side, curve in every.items()}
    return {"steps": steps, "max_difference": difference(ours, eager), "bound": bound, **every}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.convergence")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("curve", choices=CURVES)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(argv)
    found = compare(options.curve, options.steps, options.device)
    print(json.dumps(found))
    return 0 if found["max_difference"] <= found["bound"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
