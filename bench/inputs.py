"""Inputs of every op, drawn from a generator: fresh random data, never zeros.

A factory gives the tensors a case works on, by name; those that require a gradient are the leaves
whose gradients are gated and timed. Sizes are named as in `bench.work`.
"""

import torch
from torch import Tensor

from bench.peers import Tensors, contrastive


class Draw:
    """Random tensors of one device and dtype from one generator."""

    def __init__(self, device: str, dtype: torch.dtype, generator: torch.Generator):
        self.device, self.dtype, self.generator = device, dtype, generator

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        """A leaf that asks for its gradient."""
        values = torch.empty(shape, device=self.device, dtype=self.dtype)
        values.normal_(mean, std, generator=self.generator)
        return values.requires_grad_()

    def matched_rows(self, rows: int, channels: int) -> tuple[Tensor, Tensor]:
        """Two towers' L2-normalised features: row i of one is closest to row i of the other."""
        drawn = torch.empty(3, rows, channels, device=self.device).normal_(generator=self.generator)
        towers = torch.nn.functional.normalize(drawn[:2] + drawn[2], dim=-1).to(self.dtype)
        return tuple(tower.clone() for tower in towers)

    def kept(self, size: int, share: float) -> Tensor:
        """A boolean mask that keeps exactly ``round(share * size)`` of its entries."""
        order = torch.randperm(size, generator=self.generator, device=self.device)
        return order < round(share * size)


def _attention_extras(s: dict, draw: Draw) -> Tensors:
    extras = {}
    if s.get("head_gate"):
        extras["head_gate"] = draw.normal(s["H"], mean=1.0, std=0.1)
    if s.get("key_mask"):
        # captions padded to the context length: every row keeps at least its first token
        lengths = torch.randint(
            1, s["L"] + 1, (s["B"], 1), generator=draw.generator, device=draw.device
        )
        extras["key_mask"] = torch.arange(s["L"], device=draw.device) < lengths
    return extras


def attention(s: dict, draw: Draw) -> Tensors:
    """q, k, v (B, L, H, D)."""
    shape = (s["B"], s["L"], s["H"], s["D"])
    return {name: draw.normal(*shape) for name in "qkv"} | _attention_extras(s, draw)


def attention_qkv(s: dict, draw: Draw) -> Tensors:
    """qkv (B, L, 3, H, D), as one projection writes it."""
    return {"qkv": draw.normal(s["B"], s["L"], 3, s["H"], s["D"])} | _attention_extras(s, draw)


sdpa = attention


def gelu_mlp(s: dict, draw: Draw) -> Tensors:
    """x (M, C) and both layers, scaled so that the pre-activation is about standard normal."""
    tensors = {
        "x": draw.normal(s["M"], s["C"]),
        "fc1_weight": draw.normal(s["F"], s["C"], std=s["C"] ** -0.5),
        "fc1_bias": draw.normal(s["F"], std=0.1),
        "fc2_weight": draw.normal(s["C"], s["F"], std=s["F"] ** -0.5),
        "fc2_bias": draw.normal(s["C"], std=0.1),
    }
    if s.get("hidden_gate"):
        tensors["hidden_gate"] = draw.normal(s["F"], mean=1.0, std=0.1)
    return tensors


def layer_norm(s: dict, draw: Draw) -> Tensors:
    """x (M, C), weight, bias, and by the sizes a residual or TinyCLIP's channel mask."""
    tensors = {
        "x": draw.normal(s["M"], s["C"]),
        "weight": draw.normal(s["C"], mean=1.0, std=0.1),
        "bias": draw.normal(s["C"], std=0.1),
    }
    if s.get("residual"):
        tensors["residual"] = draw.normal(s["M"], s["C"])
    if s.get("channel_mask"):
        tensors["channel_mask"] = draw.kept(s["C"], share=0.75)
    return tensors


def contrastive_loss(s: dict, draw: Draw) -> Tensors:
    """image, text (B, D) and the scale; with Dt a teacher's features, which get no gradient."""
    image, text = draw.matched_rows(s["B"], s["D"])
    scale = torch.tensor(s["scale"], device=draw.device)
    leaves = {"image": image, "text": text, "logit_scale": scale}
    tensors = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    if s.get("Dt"):
        teacher = draw.matched_rows(s["B"], s["Dt"])
        tensors |= dict(zip(("teacher_image", "teacher_text"), teacher, strict=True))
    return tensors


def block(s: dict, draw: Draw) -> Tensors:
    """x (B, L, C), a block's parameters under open_clip's names; masked, TinyCLIP's three gates."""
    c, f = s["H"] * s["D"], s["F"]
    tensors = {
        "x": draw.normal(s["B"], s["L"], c),
        "ln_1.weight": draw.normal(c, mean=1.0, std=0.1),
        "ln_1.bias": draw.normal(c, std=0.1),
        "attn.in_proj_weight": draw.normal(3 * c, c, std=c**-0.5),
        "attn.in_proj_bias": draw.normal(3 * c, std=0.1),
        "attn.out_proj.weight": draw.normal(c, c, std=c**-0.5),
        "attn.out_proj.bias": draw.normal(c, std=0.1),
        "ln_2.weight": draw.normal(c, mean=1.0, std=0.1),
        "ln_2.bias": draw.normal(c, std=0.1),
        "mlp.c_fc.weight": draw.normal(f, c, std=c**-0.5),
        "mlp.c_fc.bias": draw.normal(f, std=0.1),
        "mlp.c_proj.weight": draw.normal(c, f, std=f**-0.5),
        "mlp.c_proj.bias": draw.normal(c, std=0.1),
    }
    if s.get("masked"):
        for name, size in (("head_gate", s["H"]), ("hidden_gate", f), ("channel_gate", c)):
            gate = draw.normal(size, mean=1.0, std=0.1).detach() * draw.kept(size, share=0.75)
            tensors[name] = gate.requires_grad_()
    return tensors


def _model(name: str, draw: Draw, prefix: str = "", only: str = "") -> Tensors:
    """A model's parameters as a new one has them, fp32 leaves under their names."""
    from bench.peers.model import model_config
    from tinyclip.models import create_model

    with torch.random.fork_rng(), torch.device(draw.device):
        torch.manual_seed(draw.generator.initial_seed())
        named = create_model(model_config(name)).named_parameters()
    return {prefix + n: p.detach().requires_grad_() for n, p in named if n.startswith(only)}


def _images(s: dict, draw: Draw, dtype: torch.dtype) -> Tensor:
    """(B, 3, height, width), standard normal as preprocessed pixels are."""
    from bench.peers.model import model_config

    shape = (s["B"], 3, *model_config(s["model"]).vision.height_width)
    drawn = torch.empty(shape, device=draw.device).normal_(generator=draw.generator)
    return drawn.to(dtype)


def train_step(s: dict, draw: Draw) -> Tensors:
    """images, texts (B, L) that end at half their context, and the parameters."""
    from bench.peers.model import model_config

    text = model_config(s["model"]).text
    texts = torch.randint(
        1, text.vocab_size - 1, (s["B"], text.context_length), generator=draw.generator,
        device=draw.device,
    )  # fmt: skip
    texts[:, text.context_length // 2] = text.vocab_size - 1  # the end of text is the largest token
    inputs = {"images": _images(s, draw, torch.float32), "texts": texts}
    return {**inputs, **_model(s["model"], draw)}


def distill_step(s: dict, draw: Draw) -> Tensors:
    """The student's `train_step`, and a teacher's parameters without a gradient."""
    from bench.peers.model import TEACHER

    teacher = _model(s["teacher"], draw, TEACHER)
    return train_step(s, draw) | {name: tensor.detach() for name, tensor in teacher.items()}


def encode_image(s: dict, draw: Draw) -> Tensors:
    """images and the image tower's parameters in the case's dtype, no leaves."""
    tower = _model(s["model"], draw, only="visual.")
    parameters = {name: tensor.detach().to(draw.dtype) for name, tensor in tower.items()}
    return {"images": _images(s, draw, draw.dtype), **parameters}


def gemm(s: dict, draw: Draw) -> Tensors:
    """x (M, K), weight (N, K)."""
    return {"x": draw.normal(s["M"], s["K"]), "weight": draw.normal(s["N"], s["K"])}


def copy(s: dict, draw: Draw) -> Tensors:
    """N elements."""
    return {"x": draw.normal(s["N"])}


def contrastive_stats(s: dict, draw: Draw) -> Tensors:
    """The loss's features for pass 1, which has no gradient."""
    return {name: tensor.detach() for name, tensor in contrastive_loss(s, draw).items()}


def contrastive_grads(s: dict, draw: Draw) -> Tensors:
    """The features and what pass 1 keeps of them, for pass 2."""
    tensors = contrastive_stats(s, draw)
    rows, cols, positive = contrastive.stats(tensors, s)
    return tensors | {"rows": rows, "cols": cols, "positive": positive}
