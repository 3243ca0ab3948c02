"""What every op owes autograd: subsets, strides, autocast, checkpoints, compile, first order."""

from itertools import combinations

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import tinyclip
from tests.support.samples import SAMPLES, leaves, total
from tinyclip import _extension
from tinyclip.ops import _contracts

LINEAR = ("fc2_bias", "bias")  # no gradient depends on them, if upstream none does
BACKENDS = ("torch", "reference", *(("cpu",) if _extension.load() is not None else ()))
# Attention has no C++.
every_case = pytest.mark.parametrize(
    ("sample", "backend"),
    [
        pytest.param(sample, backend, id=f"{sample.__name__}-{backend}")
        for sample in SAMPLES
        for backend in BACKENDS
        if backend != "cpu" or not sample.__name__.startswith("attention")
    ],
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(11)


@every_case
def test_any_subset_of_inputs(sample, backend):
    """Frozen inputs get no gradient, and the others the one they get when all require it."""
    op, tensors, options = sample()
    with tinyclip.backend(backend):
        full = leaves(tensors)
        total(op(**full, **options)).backward()
        for size in range(len(tensors) + 1):
            for frozen in combinations(tensors, size):
                some = leaves(tensors, frozen)
                outs = op(**some, **options)
                if size == len(tensors):
                    assert not total(outs).requires_grad
                    continue
                total(outs).backward()
                for name, tensor in some.items():
                    if name in frozen:
                        assert tensor.grad is None, name
                    else:
                        torch.testing.assert_close(tensor.grad, full[name].grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["attention", "gelu_mlp", "layer_norm", "contrastive_grads"])
def test_no_work_for_frozen_inputs(op, backend):
    """A gradient that nobody asked for is not computed: it comes back empty."""
    x, weight = torch.randn(6, 6), torch.randn(6, 6)
    if op == "attention":
        q = torch.randn(1, 6, 2, 4)
        out, stats = torch.ops.tinyclip.attention_fwd(q, q, q, None, None, False, 0.5, "reference")
        call = torch.ops.tinyclip.attention_bwd
        arguments = (out, q, q, q, out, stats, None, None, False, 0.5, [True, False, False, False])
        backend = "reference"  # `torch` is SDPA with PyTorch's own autograd
        used = [0]
    elif op == "gelu_mlp":
        call, used = torch.ops.tinyclip.gelu_mlp_bwd, [2]
        needs = [False, False, True, False, False, False]
        arguments = (x, x, x, weight, weight, None, "gelu", needs)
    elif op == "layer_norm":
        call, used = torch.ops.tinyclip.layer_norm_bwd, [2]
        ones = torch.ones(6)
        arguments = (x, None, x, ones, ones, ones, ones, None, [False, False, True])
    else:
        call, used = torch.ops.tinyclip.contrastive_grads, [1]
        stats = torch.ones(5, 6)
        w, scale = torch.tensor(0.1), torch.tensor(2.0)
        arguments = (x, x, scale, stats, stats, w, w, 0.0, None, None, None, 0)
        arguments = (*arguments, [False, True, False])
    for i, gradient in enumerate(call(*arguments, backend)):
        assert (gradient.numel() > 0) == (i in used), i


@every_case
def test_upstream_gradients_of_any_stride(sample, backend):
    op, tensors, options = sample()
    found = []
    with tinyclip.backend(backend):
        for kind in ("contiguous", "zero_stride", "transposed"):
            inputs = leaves(tensors)
            outs = op(**inputs, **options)
            outs = outs if isinstance(outs, tuple) else (outs,)
            douts = []
            for out in outs:
                dout = torch.ones(()).expand(out.shape)
                if kind != "zero_stride":
                    dout = torch.ones(out.shape)
                if kind == "transposed" and out.dim() > 1:
                    dout = torch.ones(out.transpose(0, -1).shape).transpose(0, -1)
                douts.append(dout)
            torch.autograd.backward(outs, douts)
            found.append([tensor.grad for tensor in inputs.values()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@every_case
def test_double_backward_raises(sample, backend):
    op, tensors, options = sample()
    with tinyclip.backend(backend):
        inputs = leaves(tensors)
        grads = torch.autograd.grad(
            total(op(**inputs, **options)), list(inputs.values()), create_graph=True
        )
        for grad in grads:
            with pytest.raises(RuntimeError, match="double backward"):
                grad.sum().backward(retain_graph=True)


@every_case
@pytest.mark.parametrize("upstream", ["constant", "of the output"])
def test_a_gradient_penalty_raises(sample, backend, upstream):
    """Also where the engine is told which inputs it is for, and looks for paths to them alone."""
    op, tensors, options = sample()
    with tinyclip.backend(backend):
        inputs = leaves(tensors)
        loss = total(op(**inputs, **options))
        loss = loss if upstream == "constant" else loss.square()
        wanted = list(inputs.values())
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        for name, x in inputs.items():
            penalised = loss + sum(grad.square().sum() for grad in grads)
            for call in (
                lambda p=penalised, x=x: torch.autograd.grad(p, x, retain_graph=True),
                lambda p=penalised, x=x: p.backward(inputs=[x], retain_graph=True),
            ):
                if upstream == "constant" and name in LINEAR:
                    continue  # no gradient depends on it
                with pytest.raises(RuntimeError, match="double backward"):
                    call()


@every_case
def test_one_tensor_given_twice_compiles(sample, backend):
    op, tensors, options = sample()
    names = [n for n, x in tensors.items() if x is not None and x.is_floating_point()]
    pairs = [
        (a, b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if tensors[a].shape == tensors[b].shape and tensors[a].dtype == tensors[b].dtype
    ]
    assert pairs or op.__name__ == "attention_qkv"
    for a, b in pairs:
        found = []
        for function in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
            inputs = leaves(tensors)
            inputs[b] = inputs[a]
            with tinyclip.backend(backend):
                total(function(**inputs, **options)).backward()
            found.append([x.grad for x in inputs.values()])
        torch.testing.assert_close(found[1], found[0])


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(sample, backend, dtype):
    """The output dtype is the twin's, gradients have their tensors'; fp32 results are as precise as
    those of the inputs that autocast leaves: layer_norm's as they are, features in 16 bit."""
    op, tensors, options = sample()
    if (op.__name__, backend) == ("gelu_mlp", "cpu"):
        pytest.skip("its products are in 16 bit then")
    with tinyclip.backend(backend):
        inputs = leaves(tensors)
        with torch.autocast("cpu", dtype):
            outs = op(**inputs, **options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        lifted = op.__name__ in ("layer_norm", "contrastive_loss")
        assert outs[0].dtype == (torch.float32 if lifted else dtype)
        total(outs).backward()  # outside the context
        outside = [tensor.grad for tensor in inputs.values()]
        inputs = leaves(tensors)
        with torch.autocast("cpu", dtype):
            total(op(**inputs, **options)).backward()
        for name, tensor, grad in zip(inputs, inputs.values(), outside, strict=True):
            assert grad.dtype == tensor.dtype
            assert torch.equal(grad, tensor.grad), f"{name}: backward inside autocast differs"
        if lifted:
            plain = leaves(tensors)
            given = dict(plain)
            if op.__name__ == "contrastive_loss":
                given |= {name: plain[name].to(dtype) for name in ("image", "text")}
                its_image, its_text, its_scale = options["teacher"]
                teacher = tinyclip.Teacher(its_image.to(dtype), its_text.to(dtype), its_scale)
                options = {**options, "teacher": teacher}
            total(op(**given, **options)).backward()
            for tensor, grad in zip(plain.values(), outside, strict=True):
                torch.testing.assert_close(grad, tensor.grad)


@every_case
def test_backward_under_autocast_of_a_forward_outside_it(sample, backend):
    op, tensors, options = sample()
    with tinyclip.backend(backend):
        plain, mixed = leaves(tensors), leaves(tensors)
        total(op(**plain, **options)).backward()
        loss = total(op(**mixed, **options))
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        for name in tensors:
            torch.testing.assert_close(mixed[name].grad, plain[name].grad)


def test_autocast_leaves_fp64_alone():
    x = torch.randn(3, 5, dtype=torch.float64)
    w = torch.randn(5, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert tinyclip.ops.gelu_mlp(x, w, None, w, None).dtype == torch.float64
        assert tinyclip.ops.layer_norm(x, None, None).dtype == torch.float64


@every_case
def test_checkpoint_changes_no_bit(sample, backend):
    op, tensors, options = sample()
    with tinyclip.backend(backend):
        plain, again = leaves(tensors), leaves(tensors)
        total(op(**plain, **options)).backward()
        outs = checkpoint(lambda **kw: op(**kw, **options), **again, use_reentrant=False)
        total(outs).backward()
    for name in tensors:
        assert torch.equal(plain[name].grad, again[name].grad), name


@every_case
def test_compile_fullgraph_dynamic(sample, backend):
    op, _, _ = sample()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        _, tensors, options = sample(n=n)
        eager, traced = leaves(tensors), leaves(tensors)
        with tinyclip.backend(backend):
            total(op(**eager, **options)).backward()
            total(compiled(**traced, **options)).backward()
        for name in tensors:
            torch.testing.assert_close(traced[name].grad, eager[name].grad)


def test_compile_does_not_grow_with_the_batch():
    """One graph serves many batch sizes; the contrastive chunks are not unrolled into it."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        tinyclip.ops.contrastive_loss, fullgraph=True, dynamic=True, backend=counter
    )
    counts = []
    for n in (5, 9, 17, 33):
        compiled(torch.randn(n, 4), torch.randn(n, 4), torch.tensor(3.0))
        counts.append((counter.frame_count, counter.op_count))
    assert len(set(counts)) == 1, counts


def test_compile_notices_the_backend():
    """The choice is a guarded global: a compiled function follows a change of backend."""
    seen = []

    def spy(graph, example_inputs):
        seen.append("tinyclip" in graph.code)
        return graph.forward

    x, w = torch.randn(3, 4), torch.randn(4, 4)
    compiled = torch.compile(tinyclip.ops.gelu_mlp, backend=spy, fullgraph=True)
    for backend in ("torch", "reference"):
        with tinyclip.backend(backend):
            compiled(x, w, None, w, None)
    assert seen == [False, True]


def test_backend_of_forward_is_kept_for_backward():
    x = torch.randn(3, 4, requires_grad=True)
    w = torch.randn(4, 4)
    with tinyclip.backend("reference"):
        y = tinyclip.ops.gelu_mlp(x, w, None, w, None)
    calls = []
    original = _contracts._load

    def watch(op, backend):
        calls.append((op, backend))
        return original(op, backend)

    _contracts._load = watch
    try:
        with tinyclip.backend("torch"):
            y.sum().backward()
    finally:
        _contracts._load = original
    assert calls == [("gelu_mlp_bwd", "reference")]


def test_selective_checkpointing_sees_the_ops():
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        return torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4)
    with tinyclip.backend("reference"):
        checkpoint(
            lambda x: tinyclip.ops.gelu_mlp(x, w, None, w, None),
            x,
            use_reentrant=False,
            context_fn=lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts(policy),
        ).sum().backward()
    assert set(seen) & set(tinyclip.ops.SAC_SAVE_OPS)
