"""A problem: one call of an op with its inputs, and the four ways to answer it.

`ours` is the public op under a backend; `truth` the reference on fp64 copies; `eager` the reference
in the problem's own dtype; `fused` what a PyTorch user would write, with PyTorch's autograd.

PyTorch's kernels read some of our views wrongly on a GPU, down to an error after which the device
is lost to the process. So there `fused` is given aligned copies, after everything else has been
computed; where it raises all the same, the rule does without it, and the result names it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import tinyclip
from tests.support.rule import Ratios, Results, ratios

Tensors = dict[str, torch.Tensor | None]


def on_gpu(tensor: torch.Tensor | None) -> bool:
    """Whether PyTorch's GPU kernels would read the tensor."""
    return tensor is not None and tensor.is_cuda


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous, in memory of its own."""
    if not on_gpu(tensor):
        return tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


@dataclass
class Problem:
    """`op(**tensors, **options)`; gradients of `frozen` names and of non-float tensors are skipped.

    `op` takes the tensors by name and returns a tensor or a tuple; `douts` are its upstream
    gradients. `cond` gives each result's cancelling terms from fp64 tensors.
    """

    label: str
    op: Callable
    tensors: Tensors
    fused: Callable
    cond: Callable[["Problem", Tensors, list[torch.Tensor]], Results]
    options: dict = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    douts: list[torch.Tensor] = field(default_factory=list)
    roundings: dict[str, float] = field(default_factory=dict)
    rounded_ds: bool = False  # of the contrastive op: whether dS is kept at the features' precision

    def _run(self, call: Callable, tensors: Tensors, douts: list[torch.Tensor]) -> Results:
        leaves = {}
        for name, tensor in tensors.items():
            leaf = None if tensor is None else tensor.detach()
            if leaf is not None and leaf.is_floating_point() and name not in self.frozen:
                leaf.requires_grad_()
            leaves[name] = leaf
        outs = call(**leaves, **self.options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        wanted = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
        results = {f"out{i}" if i else "out": out.detach() for i, out in enumerate(outs)}
        if wanted:
            differentiable = [i for i, out in enumerate(outs) if out.requires_grad]
            grads = torch.autograd.grad(
                [outs[i] for i in differentiable],
                list(wanted.values()),
                [douts[i] for i in differentiable],
                allow_unused=True,
                materialize_grads=True,
            )
            for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
                assert grad.dtype == leaf.dtype, f"d{name} is {grad.dtype}, {name} {leaf.dtype}"
                results[f"d{name}"] = grad
        else:
            assert not any(out.requires_grad for out in outs)
        return results

    def ours(self, backend: str) -> Results:
        with tinyclip.backend(backend):
            return self._run(self.op, self.tensors, self.douts)

    def doubled(self) -> tuple[Tensors, list[torch.Tensor]]:
        tensors = {
            name: t.detach().double() if t is not None and t.is_floating_point() else t
            for name, t in self.tensors.items()
        }
        return tensors, [dout.double() for dout in self.douts]

    def truth(self) -> Results:
        tensors, douts = self.doubled()
        with tinyclip.backend("reference"):
            return self._run(self.op, tensors, douts)

    def _fused_results(self) -> tuple[list[Results], tuple[str, ...]]:
        """Results of `fused`, or none and a note that names it."""
        tensors = {name: _copy(tensor) for name, tensor in self.tensors.items()}
        gpu = any(map(on_gpu, tensors.values()))
        if gpu:
            torch.cuda.synchronize()  # what is raised here is ours
        try:
            results = self._run(self.fused, tensors, [_copy(dout) for dout in self.douts])
            if gpu:
                torch.cuda.synchronize()  # and here its own
        except RuntimeError as error:
            peer = f"{self.fused.__module__}.{self.fused.__qualname__}"
            reason = str(error).strip().partition("\n")[0]
            note = f"without the peer {peer}, which raised {type(error).__name__}: {reason}"
            print(f"{self.label}: {note}")
            if gpu:
                try:
                    torch.cuda.synchronize()
                except RuntimeError:
                    raise RuntimeError(f"{self.label}: the device is lost {note}") from error
            return [], (note,)
        return [results], ()

    def judge(self, backend: str) -> Ratios:
        """error / bound of every result under the tolerance rule."""
        tensors, douts = self.doubled()
        ours, truth, eager = self.ours(backend), self.truth(), self.ours("reference")
        conds = self.cond(self, tensors, douts)
        fused, notes = self._fused_results()
        conds = {name: conds[name] for name in ours}
        return Ratios(ratios(ours, truth, [eager, *fused], conds, self.roundings), notes)
