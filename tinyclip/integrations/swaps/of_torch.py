"""torch.nn's modules: attention, LayerNorm, and the MLP that is three modules in a row.

Letters: B batch, L tokens, H heads, D head dim, C channels, F hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyclip import ops
from tinyclip.integrations.swaps.activations import formula_of
from tinyclip.integrations.swaps.base import Session, State, Swap, has_hooks, is_plain, where
from tinyclip.nn.attention import attend


class PackedAttention(Swap):
    """What attentions that project q, k and v at once share; the dropout is open_clip's, timm's."""

    option = "attention"

    @classmethod
    def dropout_of(cls, module: nn.Module) -> float:
        return module.attn_drop.p

    @classmethod
    def limit(cls, module):
        return dropout_limit(cls.dropout_of(module))

    @classmethod
    def example(cls, module):
        packed = torch.empty(2, 50, 3, module.num_heads, module.head_dim, **where(module))
        return "attention_qkv", (packed.requires_grad_(),), {}

    @classmethod
    def detail(cls, module):
        return f"attention, {module.num_heads} heads of {module.head_dim}"


class MultiheadAttention(PackedAttention):
    """torch.nn.MultiheadAttention by `ops.attention_qkv`, cross-attention by `ops.attention`."""

    @classmethod
    def why_not(cls, module):
        if not module._qkv_same_embed_dim:
            return "kdim or vdim differs from embed_dim"
        if module.bias_k is not None or module.bias_v is not None:
            return "add_bias_kv"
        return "add_zero_attn" if module.add_zero_attn else None

    @classmethod
    def dropout_of(cls, module):
        return module.dropout

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        options = self._options(query, key, key_padding_mask, need_weights, attn_mask, is_causal)
        if isinstance(options, str):
            self._decline(options)
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        out = attend(
            query,
            key,
            value,
            self.in_proj_weight,
            self.in_proj_bias,
            heads=self.num_heads,
            batch_first=self.batch_first,
            **options,
        )
        if not self.batch_first:
            out = out.transpose(0, 1)
        return F.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias), None

    def _options(self, query, key, key_padding_mask, need_weights, attn_mask, is_causal):
        """What `ops.attention` is told, or why the host has to compute the call."""
        if need_weights and self._tinyclip.weights_read:
            return "need_weights=True, which is torch's default, stores the weights"
        if reason := dropped(self.dropout, self.training):
            return reason
        if query.is_nested or query.dim() != 3:
            return "query is nested or has no batch"
        if is_causal and attn_mask is None:
            return "is_causal without attn_mask, which torch refuses"
        if is_causal and query.shape != key.shape:
            return "is_causal with other keys than queries"
        causal, key_mask = is_causal, None
        if attn_mask is not None and not is_causal:
            pattern = self._tinyclip.session.masks.read(attn_mask, "hidden", self.num_heads)
            if pattern is None:
                return OTHER_MASK
            causal, key_mask = pattern
        batch = query.shape[0 if self.batch_first else 1]
        if key_mask is not None:
            key_mask = key_mask.expand(batch, -1)
        if key_padding_mask is not None:
            if key_padding_mask.dtype != torch.bool:
                return "key_padding_mask is no bool mask"
            hidden = key_padding_mask
            key_mask = ~hidden if key_mask is None else key_mask & ~hidden
        return {"causal": causal, "key_mask": key_mask}


OTHER_MASK = "attn_mask is not causal, nor hides the same keys from every query"


def dropped(p: float, training: bool) -> str | None:
    """Why a call whose dropout is at work is the host's."""
    return f"dropout {p:g} in training" if p and training else None


def dropout_limit(p: float) -> str | None:
    return f"in training the host computes it: dropout {p:g}" if p else None


class LayerNorm(Swap):
    """torch.nn.LayerNorm over one dimension by `ops.layer_norm`; can add a residual before."""

    option = "norm"

    @classmethod
    def why_not(cls, module):
        if len(module.normalized_shape) != 1:
            return f"normalized_shape {tuple(module.normalized_shape)} has more than one dimension"
        return None

    @classmethod
    def example(cls, module):
        (channels,) = module.normalized_shape
        return "layer_norm", (torch.empty(2, channels, **where(module)), None, None), {}

    @classmethod
    def detail(cls, module):
        return "layer_norm"

    def forward(self, input, residual=None):
        return normalised(self, input, residual, twin_dtype(input, residual))


class KeepsDtype(LayerNorm):
    """A LayerNorm that gives its input's dtype, under autocast too: open_clip's, timm's in fp32."""

    def forward(self, x, residual=None):
        return normalised(self, x, residual, sum_dtype(x, residual))


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def twin_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype | None:
    """F.layer_norm's dtype: autocast lifts it to fp32 (None: as the op does), but on a CPU."""
    return sum_dtype(x, residual) if x.device.type == "cpu" else None


def normalised(
    module: nn.LayerNorm, x: Tensor, residual: Tensor | None, dtype: torch.dtype | None
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(x), or (norm(x + residual), x + residual); the norm in `dtype`."""
    result = ops.layer_norm(x, module.weight, module.bias, eps=module.eps, residual=residual)
    y, total = (result, None) if residual is None else result
    if dtype is not None and y.dtype != dtype:
        y = y.to(dtype)
    return y if residual is None else (y, total)


def added(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual): one op where the norm is swapped and has no hooks."""
    if isinstance(norm, LayerNorm) and not has_hooks(norm):
        return norm(x, residual=residual)
    total = residual + x
    return norm(total), total


class MLP(Swap):
    """What all MLPs share: two linears, an activation, dropouts that are not at work."""

    option = "mlp"

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[nn.Module, object, nn.Module, tuple]:
        """(first linear, activation, second linear, what else stands between or after them)."""
        raise NotImplementedError

    @classmethod
    def why_not(cls, module):
        first, activation, second, others = cls.parts(module)
        if reason := _linears(first, second):
            return reason
        for other in others:
            if type(other) not in (nn.Identity, nn.Dropout):
                return f"{type(other).__name__} inside the MLP"
        if formula_of(activation) is None:
            return f"activation {_name(activation)} is none of gelu, gelu_tanh, quick_gelu, relu"
        return None

    @classmethod
    def limit(cls, module):
        others = cls.parts(module)[3]
        return dropout_limit(max((x.p for x in others if isinstance(x, nn.Dropout)), default=0.0))

    @classmethod
    def learn(cls, module: nn.Module, session: Session) -> State:
        activation = cls.parts(module)[1]
        return State(session, activation, formula_of(activation))

    @classmethod
    def example(cls, module):
        first, _, second, _ = cls.parts(module)
        x = torch.empty(2, first.in_features, **where(module))
        return "gelu_mlp", (x, first.weight, first.bias, second.weight, second.bias), {}

    @classmethod
    def detail(cls, module):
        return f"gelu_mlp, {formula_of(cls.parts(module)[1])}"

    def _computed(self, x: Tensor) -> Tensor | None:
        """The MLP of x by the op, or None where the host has to compute it."""
        first, activation, second, others = self.parts(self)
        state = self._tinyclip
        reason = _linears(first, second)
        for other in others:
            if isinstance(other, nn.Dropout):
                reason = reason or dropped(other.p, other.training)
        if activation is not state.activation:
            reason = "the activation was replaced since"
        for other in (activation, *others):
            if isinstance(other, nn.Module) and has_hooks(other):
                reason = f"hooks on {type(other).__name__}"
        if reason is not None:
            self._decline(reason)
            return None
        return ops.gelu_mlp(
            x,
            first.weight,
            first.bias,
            second.weight,
            second.bias,
            activation=state.formula,
        )


def _linears(*linears: nn.Module) -> str | None:
    for linear in linears:
        if not is_plain(linear, nn.Linear):
            return f"{type(linear).__name__} is no plain torch.nn.Linear"
    return None


def _name(activation: object) -> str:
    return getattr(activation, "__name__", type(activation).__name__)


class SequentialMLP(MLP):
    """torch.nn.Sequential of Linear, activation, Linear: open_clip's, OpenAI's, heads."""

    @classmethod
    def fits(cls, module: nn.Sequential) -> bool:
        """Whether it is one: by a CLIP block's names, or two linears around one other thing."""
        children = module._modules
        if "c_fc" in children and "c_proj" in children:
            return True
        linears = [isinstance(child, nn.Linear) for child in children.values()]
        return linears[:2] == [True, False] and sum(linears) == 2

    @classmethod
    def parts(cls, module):
        first, activation, *rest = module._modules.values()
        linears = [child for child in rest if isinstance(child, nn.Linear)]
        second = module._modules.get("c_proj", linears[0] if linears else None)
        return first, activation, second, tuple(child for child in rest if child is not second)

    def forward(self, input):
        y = self._computed(input)
        return super().forward(input) if y is None else y
