"""What is measured: every op at CLIP's sizes, on a CPU small enough to finish, on a GPU in full.

Adding a case is one line of a table or a generator below. Adding an op is a function of its name in
`inputs`, `work` and `calls`, its peers, and one generator here.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import calls, inputs, work
from bench.case import BOTH, FORWARD, FORWARD_GRAPHED, GRAPHED, Case
from bench.peers import (
    Peer,
    Tensors,
    attention,
    block,
    compiled,
    contrastive,
    layer_norm,
    mlp,
    model,
    plain,
)

CLIP_SCALE = 1 / 0.07  # the multiplier every CLIP starts from

_SDPA = {
    "sdpa-flash": attention.sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": attention.sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": attention.sdpa(SDPBackend.EFFICIENT_ATTENTION),
}
_ATTENTION = {
    **_SDPA,
    "sdpa-math": attention.sdpa(SDPBackend.MATH),
    "eager": plain(attention.eager),
    "compile": compiled(attention.eager),
}
_QKV = {"mha-internals": attention.mha_internals(), **_ATTENTION}
_GATED = {"tinyclip-masked": plain(attention.tinyclip_masked), **_ATTENTION}
_MLP = {
    "eager": plain(mlp.eager),
    "triton-fused": mlp.ours("fused"),
    "triton-pointwise": mlp.ours("pointwise"),
    "compile": compiled(mlp.eager),
}
_NORM = {"eager": plain(layer_norm.eager), "compile": compiled(layer_norm.eager)}
_MASKED_NORM = {
    "tinyclip-masked": plain(layer_norm.tinyclip_masked),
    "eager": plain(layer_norm.multiplied),
    "compile": compiled(layer_norm.multiplied),
}
_LOSS = {
    "eager": plain(contrastive.eager),
    "eager-fp32": plain(contrastive.eager_fp32),
    "compile": compiled(contrastive.eager),
}
_CLIP = {"open_clip": contrastive.open_clip_loss(), **_LOSS}
_DISTIL = {"tinyclip": plain(contrastive.tinyclip), **_LOSS}
_STATS = {"eager": plain(contrastive.stats), "compile": compiled(contrastive.stats)}
_GRADS = {"eager": plain(contrastive.grads), "compile": compiled(contrastive.grads)}
_ENGINES = {name: contrastive.engine(name) for name in ("cuda", "triton")}
_BLOCK = {
    "open_clip": block.open_clip_block(),
    "eager": block.eager(),
    "compile": compiled(block.plain_maths),
}
_MASKED_BLOCK = {"tinyclip-masked": plain(block.tinyclip_masked)}
_STEP = {
    "open_clip": model.open_clip_training,
    "open_clip-compile": model.open_clip_compiled,
    "ours-compile": model.ours_compiled,
}
_INFERENCE = {"open_clip": model.open_clip_inference}

# The towers of CLIP: B/32 vision, text, B/16, L/14 and L/14 at 336 pixels.
_TOWERS = {
    "50x12h": {"L": 50, "H": 12, "D": 64},
    "77 causal x8h": {"L": 77, "H": 8, "D": 64, "causal": True},
    "197x12h": {"L": 197, "H": 12, "D": 64},
    "257x16h": {"L": 257, "H": 16, "D": 64},
    "577x16h": {"L": 577, "H": 16, "D": 64},
}
# Their MLPs at batch 1024: B/32, B/16, L/14 and the width-512 text; B/16's at 64 and 256.
_MLPS = {
    "51200x768": {"M": 51_200, "C": 768, "F": 3072},
    "201728x768": {"M": 201_728, "C": 768, "F": 3072},
    "263168x1024": {"M": 263_168, "C": 1024, "F": 4096},
    "78848x512": {"M": 78_848, "C": 512, "F": 2048},
    "12608x768": {"M": 12_608, "C": 768, "F": 3072},
    "50432x768": {"M": 50_432, "C": 768, "F": 3072},
}
# Models whose steps are timed, and a student's teacher.
_MODELS = ("ViT-B-32", "TinyCLIP-ViT-8M-16-Text-3M")
_TEACHER = "ViT-B-16"
_CPU_BATCH = {"50x12h": 16, "77 causal x8h": 16, "197x12h": 4, "257x16h": 2, "577x16h": 1}


def _case(op: str, name: str, device: str, sizes: dict, beside: Mapping[str, Peer], **more) -> Case:
    return Case(
        op=op,
        name=name,
        device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        sizes=sizes,
        inputs=getattr(inputs, op),
        work=getattr(work, op),
        call=getattr(calls, op, None),
        peers=beside,
        **more,
    )


def _attentions(device: str) -> Iterator[Case]:
    more = {"eager": attention.eager, "reduced": {"B": 2}}
    gpu = [(tower, batch) for batch in (1024, 64, 256) for tower in _TOWERS]
    for tower, batch in gpu if device == "cuda" else _CPU_BATCH.items():
        name, sizes = f"{tower} b{batch}", {**_TOWERS[tower], "B": batch}
        # at small batches the launches cost as much as the kernel: see it without them as well
        graphed = (GRAPHED,) if batch in (64, 256) else ()
        more |= {"fused": "sdpa-flash", "modes": (FORWARD, BOTH, *graphed)}
        yield _case("attention", name, device, sizes, _ATTENTION, **more)
        yield _case("attention_qkv", name, device, sizes, _QKV, **more)
    batch, more["modes"] = (1024 if device == "cuda" else 8), (FORWARD, BOTH)
    sizes = {**_TOWERS["50x12h"], "B": batch, "head_gate": True}
    yield _case("attention", f"50x12h gated b{batch}", device, sizes, _GATED, **more)
    sizes = {"L": 77, "H": 12, "D": 64, "B": batch, "key_mask": True}
    yield _case("attention", f"77x12h padded b{batch}", device, sizes, _ATTENTION, **more)


def _mlps(device: str) -> Iterator[Case]:
    shapes = _MLPS if device == "cuda" else {"400x512": {"M": 400, "C": 512, "F": 2048}}
    more = {"eager": mlp.eager, "reduced": {"M": 200}}
    for name, shape in shapes.items():
        for activation in ("gelu", "quick_gelu"):
            sizes = {**shape, "activation": activation}
            yield _case("gelu_mlp", f"{name} {activation}", device, sizes, _MLP, **more)


def _norms(device: str) -> Iterator[Case]:
    gpu = [(m, c) for m in (51_200, 201_728) for c in (768, 1024)]
    gpu += [(12_608, 768), (50_432, 768)]
    for m, c in gpu if device == "cuda" else [(4096, 512)]:
        sizes, name, more = {"M": m, "C": c}, f"{m}x{c}", {"reduced": {"M": 301}}
        more["eager"] = layer_norm.eager
        yield _case("layer_norm", name, device, sizes, _NORM, **more)
        added = {**sizes, "residual": True}
        yield _case("layer_norm", f"{name} residual", device, added, _NORM, **more)
        masked = {**sizes, "channel_mask": True}
        more["eager"] = layer_norm.multiplied
        yield _case("layer_norm", f"{name} masked", device, masked, _MASKED_NORM, **more)


def _losses(device: str) -> Iterator[Case]:
    gpu = (8192, 32_768, 65_536, 1024)
    width, batches = (512, gpu) if device == "cuda" else (256, (1024, 2048))
    reduced = {"B": 1037 if device == "cuda" else 301}
    for batch in batches:
        hard = {"B": batch, "D": width, "scale": CLIP_SCALE}
        soft = {**hard, "Dt": width, "alpha": 0.5}
        for name, sizes, beside in ((f"{batch}", hard, _CLIP), (f"{batch} teacher", soft, _DISTIL)):
            if device == "cpu":  # fp32 throughout: the same as eager
                beside = {peer: made for peer, made in beside.items() if peer != "eager-fp32"}
            else:  # ours is what `auto` takes; each engine by its name has a row beside it
                beside = {**beside, **_ENGINES}
            more = {"eager": contrastive.eager_fp32, "reduced": reduced}
            yield _case("contrastive_loss", name, device, sizes, beside, **more)
            if batch == batches[1]:
                passes = {"reduced": reduced, "modes": (FORWARD,)}
                more = {"eager": contrastive.stats, **passes}
                yield _case("contrastive_stats", name, device, sizes, _STATS, **more)
                more = {"eager": contrastive.grads, **passes}
                yield _case("contrastive_grads", name, device, sizes, _GRADS, **more)


def _blocks(device: str) -> Iterator[Case]:
    gpu = ("50x12h", "77 causal x8h", "197x12h", "257x16h")
    batch = 256 if device == "cuda" else 4
    for tower in gpu if device == "cuda" else ("50x12h", "77 causal x8h"):
        sizes = {**_TOWERS[tower], "B": batch, "activation": "gelu"}
        sizes["F"] = 4 * sizes["H"] * sizes["D"]
        more = {"eager": block.plain_maths, "reduced": {"B": 2}, "modes": (BOTH,)}
        yield _case("block", f"{tower} b{batch}", device, sizes, _BLOCK, **more)
    more["eager"] = block.tinyclip_masked
    for tower in ("50x12h", "197x12h") if device == "cuda" else ("50x12h",):
        sizes = {**_TOWERS[tower], "B": batch, "F": 3072, "activation": "quick_gelu"}
        masked = {**sizes, "masked": True}
        yield _case("block", f"{tower} masked b{batch}", device, masked, _MASKED_BLOCK, **more)


def _models(device: str) -> Iterator[Case]:
    """Whole steps, on a GPU only: bf16 autocast in training, bf16 weights at inference."""
    if device == "cpu":
        return
    more = {"reduced": {"B": 4}, "whole_model": True, "ours": model.ours_training}
    more |= {"eager": model.plain_training, "modes": (BOTH, GRAPHED)}
    for name in _MODELS:
        for batch in (256, 64, 1024):
            sizes = {"model": name, "B": batch}
            yield _case("train_step", f"{name} b{batch}", device, sizes, _STEP, **more)
    for batch in (256, 64, 1024):
        sizes = {"model": _MODELS[1], "teacher": _TEACHER, "B": batch}
        yield _case("distill_step", f"{_MODELS[1]} b{batch}", device, sizes, _STEP, **more)
    more |= {"eager": model.plain_inference, "ours": model.ours_inference}
    more["modes"] = (FORWARD, FORWARD_GRAPHED)
    for name in _MODELS:
        for batch in (1, 32, 256):
            sizes = {"model": name, "B": batch}
            yield _case("encode_image", f"{name} b{batch}", device, sizes, _INFERENCE, **more)


def _linear(t: Tensors, s: dict) -> Tensor:
    return torch.nn.functional.linear(t["x"], t["weight"])


def _linear_fp32(t: Tensors, s: dict) -> Tensor:
    wide = torch.promote_types(t["x"].dtype, torch.float32)
    return torch.nn.functional.linear(t["x"].to(wide), t["weight"].to(wide)).to(t["x"].dtype)


def _clone(t: Tensors, s: dict) -> Tensor:
    return t["x"].clone()


def baselines(device: str = "cuda") -> list[Case]:
    """PyTorch alone on a GPU: what the tables of every later kernel are read against."""
    if device == "rehearsal":
        return [_toy(case) for case in baselines()]
    alone = {"eager": _clone, "reduced": {"N": 2**20}, "modes": (FORWARD,)}
    found = [_case("copy", "4.3 GB", "cuda", {"N": 2**31}, {"clone": plain(_clone)}, **alone)]
    alone = {"eager": _linear_fp32, "reduced": {"M": 300}, "modes": (FORWARD,)}
    cublas = {"cublas": plain(_linear)}
    for k in (768, 1024, 512):
        for m in (51_200, 201_728, 263_168):
            sizes = {"M": m, "K": k, "N": 4 * k}
            found.append(_case("gemm", f"{m}x{k}x{4 * k}", "cuda", sizes, cublas, **alone))
    alone = {"eager": attention.eager, "reduced": {"B": 2}}
    for batch in (1024, 64):
        for tower, shape in _TOWERS.items():
            sizes = {**shape, "B": batch}
            found.append(_case("sdpa", f"{tower} b{batch}", "cuda", sizes, _SDPA, **alone))
    return found


_TOY = {"M": 64, "model": "toy", "teacher": "toy"}
_TOY_BATCH = {"contrastive_loss": 64, "contrastive_stats": 64, "contrastive_grads": 64}


def _toy(case: Case) -> Case:
    """A GPU's case on a CPU, at sizes that take milliseconds."""
    small = {**_TOY, "B": _TOY_BATCH.get(case.op, 2)}
    small |= {"N": 2**16} if case.op == "copy" else {}
    sizes, reduced = (
        {name: small.get(name, size) for name, size in given.items()}
        for given in (case.sizes, case.reduced)
    )
    return dataclasses.replace(case, device="cpu", sizes=sizes, reduced=reduced)


def cases(device: str) -> list[Case]:
    """Every op's cases on a kind of device: "cpu", "cuda", or "rehearsal", the GPU's on a CPU."""
    if device == "rehearsal":
        return [_toy(case) for case in cases("cuda")]
    groups = (_attentions, _mlps, _norms, _losses, _blocks, _models)
    return [case for group in groups for case in group(device)]


def find(identity: str, device: str) -> Case:
    """The case of an `id`."""
    for case in cases(device) + ([] if device == "cpu" else baselines(device)):
        if case.id == identity:
            return case
    raise KeyError(f"no case {identity!r} for {device}; python -m bench --list names them")


def select(found: list[Case], patterns: list[str]) -> list[Case]:
    """Those whose id is or contains one of `patterns`; all of them if there is none."""
    ids = {case.id for case in found}

    def wanted(case: Case) -> bool:
        return any(p == case.id if p in ids else p in case.id for p in patterns)

    return [case for case in found if not patterns or wanted(case)]
