"""Whole models: a training step, a distillation step, image inference; ours and open_clip's.

Both sides use the same parameters under the same names, the same images and captions, and autocast
in training. tinyclip is imported on use, so that PyTorch's own rows run before it is built.

Letters: B batch, L tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.peers import Peer, Tensors, contrastive, open_clip
from bench.timing import Timed

TEACHER = "teacher."  # the prefix of a teacher's tensors
# Replaces the published models in a rehearsal on a CPU.
TOY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 2},
}

Build = Callable[[Tensors, dict, str], Timed]
Loss = Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, float], Tensor]


def model_config(name: str):
    """The config of a published model, or of "toy"."""
    from tinyclip.models import get_config

    return get_config(TOY if name == "toy" else name)


def macs(name: str):
    """`tinyclip.models.Macs` of a model: (image, text)."""
    from tinyclip.models import count_macs

    return count_macs(model_config(name))


def skeleton(name: str) -> nn.Module:
    """Our model on the meta device: names and shapes."""
    from tinyclip.models import create_model

    with torch.device("meta"):
        return create_model(model_config(name))


def bind(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Replace a module's parameters by the given leaf tensors, which then receive gradients."""
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        holder = module.get_submodule(owner)
        delattr(holder, attribute)
        setattr(holder, attribute, tensor)
    return module


def _parameters(t: Tensors, prefix: str = "") -> Tensors:
    """The parameters of one model: of the student, or with `prefix` of the teacher."""
    named = {name: tensor for name, tensor in t.items() if name not in ("images", "texts")}
    if prefix:
        return {n.removeprefix(prefix): x for n, x in named.items() if n.startswith(prefix)}
    return {n: x for n, x in named.items() if not n.startswith(TEACHER)}


def _our_model(name: str, device: str) -> nn.Module:
    from tinyclip.models import create_model

    with torch.device(device):
        return create_model(model_config(name))


def _their_model(name: str, device: str) -> nn.Module:
    module, d = open_clip("model"), model_config(name).to_dict()
    configs = (d["embed_dim"], dict(d["vision_cfg"]), dict(d["text_cfg"]))
    with torch.device(device):
        return module.CLIP(*configs, quick_gelu=d.get("quick_gelu", False))


def _our_loss() -> Loss:
    from tinyclip import ops

    def loss(image, text, scale, teacher, alpha) -> Tensor:
        if teacher is not None:
            teacher = ops.Teacher(*teacher, contrastive.TEACHER_SCALE)
        return ops.contrastive_loss(image, text, scale, teacher=teacher, alpha=alpha)

    return loss


def _their_loss() -> Loss:
    """open_clip's without a teacher, TinyCLIP's with one."""
    clip = open_clip("loss").ClipLoss()

    def loss(image, text, scale, teacher, alpha) -> Tensor:
        if teacher is None:
            return clip(image, text, scale)
        features = {"image": image, "text": text, "logit_scale": scale}
        features |= dict(zip(("teacher_image", "teacher_text"), teacher, strict=True))
        return contrastive.tinyclip(features, {"alpha": alpha})

    return loss


def _training(make: Callable, make_loss: Callable[[], Loss], compiled: bool) -> Build:
    """``build`` of a forward pass and loss under autocast; the caller runs the backward."""

    def build(t: Tensors, s: dict, device: str) -> Timed:
        model = bind(make(s["model"], device), _parameters(t)).train()
        model = torch.compile(model) if compiled else model
        teacher = None
        if "teacher" in s:
            teacher = bind(make(s["teacher"], device), _parameters(t, TEACHER)).eval()
        loss, alpha = make_loss(), 1.0 if teacher is not None else 0.0

        def call() -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                target = None
                if teacher is not None:
                    with torch.no_grad():
                        target = teacher(t["images"], t["texts"])[:2]
                image, text, scale = model(t["images"], t["texts"])
                return loss(image, text, scale, target, alpha)

        return Timed(call)

    return build


def _inference(make: Callable) -> Build:
    def build(t: Tensors, s: dict, device: str) -> Timed:
        dtype = t["images"].dtype
        model = bind(make(s["model"], device).to(dtype).eval(), _parameters(t))
        return Timed(lambda: model.encode_image(t["images"]))

    return build


ours_training = Peer(_training(_our_model, _our_loss, compiled=False))
ours_compiled = Peer(_training(_our_model, _our_loss, compiled=True), slow_start=True, engine=True)
open_clip_training = Peer(_training(_their_model, _their_loss, compiled=False))
open_clip_compiled = Peer(_training(_their_model, _their_loss, compiled=True), slow_start=True)
ours_inference = Peer(_inference(_our_model))
open_clip_inference = Peer(_inference(_their_model))


def plain_training(t: Tensors, s: dict) -> Tensor:
    """The step on PyTorch's own ops (our modules, backend `torch`): the gate's yardstick."""
    return _plain(ours_training, t, s)


def plain_inference(t: Tensors, s: dict) -> Tensor:
    """The image tower on PyTorch's own ops."""
    return _plain(ours_inference, t, s)


def _plain(peer: Peer, t: Tensors, s: dict) -> Tensor:
    import tinyclip

    with tinyclip.backend("torch"):
        return peer.build(t, s, t["images"].device.type).call()
