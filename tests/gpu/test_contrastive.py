"""The contrastive engines on a GPU, `cuda` and `triton`: what only a device can show of them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.gpu.calls import features, gradients
from tinyclip import ops

ROOT = Path(__file__).resolve().parents[2]
HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="no CUDA device is available"),
]
both = pytest.mark.parametrize("backend", ["cuda", "triton"])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)


@every_dtype
def test_two_engines_agree(dtype):
    """The second opinion, on features of which both see every bit.

    Each gradient is within the rounding of dS in the features' dtype. In fp32 nothing is rounded to
    fewer bits, but a logit s a.b carries about s roundings of its own, and e^logit with it, so the
    rule's 8 + s count there: two engines that sum in different orders differ by 9e-7 already.
    """
    scale = 100.0
    image, text, ti, tt = features(4, 1037, 512, dtype)
    teacher = tinyclip.Teacher(ti.detach(), tt.detach(), 50.0)
    loss, *engines = zip(
        *(
            gradients(backend, image, text, scale, teacher=teacher, alpha=0.5)
            for backend in ("cuda", "triton")
        ),
        strict=True,
    )
    roundings = (8 + scale) * torch.finfo(torch.float32).eps
    torch.testing.assert_close(*loss, rtol=roundings, atol=0)
    for x, y in engines:
        difference = ((x.double() - y.double()).norm() / y.double().norm()).item()
        print(f"{dtype}: {difference:.1e}")
        assert difference <= 2 * max(roundings, torch.finfo(dtype).eps)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_are_not_rounded(backend, dtype):
    """Gradients have at most 0.35 of the error of eager autocast, whose logits are 16 bit."""
    image, text = (x.detach() for x in features(2, 2048, 512, dtype))
    text = F.normalize(0.15 * image.float() + text.float(), dim=1).to(dtype)
    image, text = image.requires_grad_(), text.requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in (image, text)]
    truth = gradients("reference", *exact, 100.0)[1:3]
    ours = gradients(backend, image, text, 100.0)[1:3]
    with torch.autocast("cuda", dtype):
        logits = 100.0 * image @ text.T
        labels = torch.arange(2048, device="cuda")
        eager = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    eager = torch.autograd.grad(eager, (image, text))
    for x, e, t in zip(ours, eager, truth, strict=True):
        ratio = ((x.double() - t).norm() / (e.double() - t).norm()).item()
        print(f"{backend} {dtype}: {ratio:.3f} of eager autocast's error")
        assert ratio <= 0.35


@both
@every_dtype
def test_reruns_change_no_bit(backend, dtype):
    """1,000 of them, with a second stream busy."""
    image, text, ti, tt = features(4, 1500, 256, dtype)
    teacher = tinyclip.Teacher(ti.detach(), tt.detach(), 50.0)
    noise, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    options = {"teacher": teacher, "alpha": 0.5}
    first = gradients(backend, image, text, 50.0, **options)
    for _ in range(1000):
        with torch.cuda.stream(side):
            noise @ noise
        for x, y in zip(gradients(backend, image, text, 50.0, **options), first, strict=True):
            assert torch.equal(x, y)


@both
def test_in_a_graph(backend):
    """Captured and replayed on new values in the same memory: nothing waits, nothing is ours."""
    image, text = features(2, 900, 512)
    scale = torch.tensor(30.0, device="cuda", requires_grad=True)

    def run():
        with tinyclip.backend(backend):
            value = ops.contrastive_loss(image, text, scale)
        return value, *torch.autograd.grad(value, (image, text, scale))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x, new in zip((image, text), features(2, 900, 512, seed=1), strict=True):
            x.copy_(new)
    graph.replay()
    for x, y in zip(captured, run(), strict=True):
        assert torch.equal(x, y)


@both
def test_a_write_on_another_stream_is_seen(backend):
    image, text = (x.detach() for x in features(2, 300, 64))
    with tinyclip.backend(backend):
        wanted = ops.contrastive_loss(image, text, 10.0)
        late, side = torch.zeros_like(image), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            late.copy_(image)
            found = ops.contrastive_loss(late, text, 10.0)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found, wanted)


two_devices = pytest.mark.skipif(
    HAS_GPU and torch.cuda.device_count() < 2, reason="one GPU is here"
)


@two_devices
@both
def test_the_tensors_device_is_not_the_current_one(backend):
    image, text = (x.detach().to("cuda:1").requires_grad_() for x in features(2, 300, 64))
    with tinyclip.backend(backend):
        value = ops.contrastive_loss(image, text, 10.0)
        assert torch.cuda.current_device() == 0
        value.backward()
    with tinyclip.backend("torch"):
        torch.testing.assert_close(value, ops.contrastive_loss(image, text, 10.0))
    assert torch.cuda.current_device() == 0


@two_devices
@pytest.mark.parametrize("backend", ["cuda"])
def test_what_was_current_stays_current(backend):
    """To the driver as to torch, after an exception too; and cuda:0 is not initialized for it."""
    command = [sys.executable, "-m", "tests.gpu.second_device"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert done.returncode == 0


@both
def test_compiled_equals_eager(backend):
    from tests.support import samples

    op, tensors, options = samples.contrastive_loss()
    tensors = {name: tensor.cuda() for name, tensor in tensors.items()}
    teacher = tinyclip.Teacher(*(x.cuda() for x in options["teacher"][:2]), 3.0)
    options = {**options, "teacher": teacher}
    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    eager, traced = samples.leaves(tensors), samples.leaves(tensors)
    with tinyclip.backend(backend):
        op(**eager, **options).backward()
        compiled(**traced, **options).backward()
    for name in tensors:
        torch.testing.assert_close(traced[name].grad, eager[name].grad)
