"""A transformer block under TinyCLIP's masks: its reference, its pruned twin, and no host syncs.

Letters: B batch, L tokens, H heads, D head dim, C channels, F hidden.
"""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.gelu_mlp import activation
from tinyclip import nn

C, H, D, HIDDEN = 40, 4, 16, 72
_WAITS = {
    "aten::_local_scalar_dense",  # .item(), float(tensor), if tensor:
    "aten::nonzero",  # and torch.where(mask), x[mask]
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
}


class NoSync(TorchDispatchMode):
    """Raise where an operator hands a tensor's values, or a size made of them, to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split(".")[0]
        # A mask as an index is a nonzero inside index.
        masked = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in _WAITS or masked:
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


def gates(dtype=torch.float64):
    """Soft gates of heads, hidden units and channels, some of each 0."""
    head, hidden, channel = (torch.rand(n, dtype=dtype) + 0.5 for n in (H, HIDDEN, C))
    for gate, dropped in ((head, 1), (hidden, 29), (channel, 11)):
        gate[torch.randperm(len(gate))[:dropped]] = 0
    return {"head_gate": head, "hidden_gate": hidden, "channel_gate": channel}


def block(kind="quick_gelu", dtype=torch.float64):
    """A block whose every parameter counts."""
    made = nn.ResidualAttentionBlock(
        C, H, mlp_ratio=None, mlp_width=HIDDEN, head_dim=D, activation=kind, dtype=dtype
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def _masked_norm(norm, x, kept):
    """TinyCLIP's: find the kept channels, normalise those, put them back among zeros."""
    index = torch.where(kept)[0]
    part = x.index_select(-1, index)
    mean = part.mean(-1, keepdim=True)
    variance = (part - mean).pow(2).mean(-1, keepdim=True)
    part = (part - mean) / torch.sqrt(variance + norm.eps) * norm.weight[index] + norm.bias[index]
    return torch.zeros_like(x).index_copy(-1, index, part)


def reference(module, x, causal, head_gate, hidden_gate, channel_gate):
    """The masked forward as TinyCLIP computes it, with explicit L x L attention."""
    kept = channel_gate != 0
    attn, mlp = module.attn, module.mlp
    y = _masked_norm(module.ln_1, x, kept)
    q, k, v = F.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * D**-0.5
    if causal:
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    heads = scores.softmax(-1) @ v * head_gate.view(1, -1, 1, 1)
    x = x + attn.out_proj(heads.transpose(1, 2).flatten(2)) * channel_gate
    hidden = activation(module.mlp.activation, mlp.c_fc(_masked_norm(module.ln_2, x, kept)))
    return x + mlp.c_proj(hidden * hidden_gate) * channel_gate


@torch.no_grad()
def pruned(module, head_gate, hidden_gate, channel_gate):
    """The smaller dense block: what is masked cut away, what is left of the gates folded in."""
    c, h, f = (torch.where(g != 0)[0] for g in (channel_gate, head_gate, hidden_gate))
    rows = torch.cat([torch.arange(D) + i * D for i in h.tolist()])
    packed = torch.cat([rows + part * H * D for part in range(3)])
    small = nn.ResidualAttentionBlock(
        len(c),
        len(h),
        mlp_ratio=None,
        mlp_width=len(f),
        head_dim=D,
        activation=module.mlp.activation,
        dtype=channel_gate.dtype,
    )
    per_row = head_gate.repeat_interleave(D)[rows]
    state = module.state_dict()
    out, proj = "attn.out_proj", "mlp.c_proj"
    cut = {name: state[name][c] for name in state if name.startswith("ln_")}
    cut["attn.in_proj_weight"] = state["attn.in_proj_weight"][packed][:, c]
    cut["attn.in_proj_bias"] = state["attn.in_proj_bias"][packed]
    cut[f"{out}.weight"] = state[f"{out}.weight"][c][:, rows] * channel_gate[c][:, None] * per_row
    cut[f"{out}.bias"] = state[f"{out}.bias"][c] * channel_gate[c]
    cut["mlp.c_fc.weight"] = state["mlp.c_fc.weight"][f][:, c]
    cut["mlp.c_fc.bias"] = state["mlp.c_fc.bias"][f]
    folded = channel_gate[c][:, None] * hidden_gate[f]
    cut[f"{proj}.weight"] = state[f"{proj}.weight"][c][:, f] * folded
    cut[f"{proj}.bias"] = state[f"{proj}.bias"][c] * channel_gate[c]
    small.load_state_dict(cut)
    return small, c


def check(backend, kind, causal, dtype, tolerance):
    """The masked block under `backend`: no sync, the reference's results, the pruned block's."""
    import tinyclip

    torch.manual_seed(11)
    module, masks = block(kind, dtype), gates(dtype)
    leaves = {name: gate.requires_grad_() for name, gate in masks.items()}
    kept = leaves["channel_gate"].detach() != 0
    x = (torch.randn(2, 9, C, dtype=dtype) * kept).requires_grad_()
    inputs = [x, *leaves.values(), *module.parameters()]
    dy = torch.randn(2, 9, C, dtype=dtype)
    with NoSync(), tinyclip.backend(backend):
        y = module(x, is_causal=causal, **leaves)
        found = [y, *torch.autograd.grad(y, inputs, dy)]
    expected = reference(module, x, causal, **leaves)
    expected = [expected, *torch.autograd.grad(expected, inputs, dy)]
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    frozen = {name: gate.detach() for name, gate in leaves.items()}
    small, index = pruned(module, **frozen)
    with torch.no_grad(), tinyclip.backend(backend):
        dense = small(x[..., index], is_causal=causal)
    assert (y[..., index] - dense).norm() <= tolerance * dense.norm()
    assert (y[..., ~kept] == 0).all()
