"""The contrastive engines on a GPU, `cuda` and `triton`: what only a device can show of them."""

import pytest
import torch
import torch.nn.functional as F

import tinyclip
from tests.support import contrastive
from tests.support.rule import Tally
from tinyclip import ops

HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="no CUDA device is available"),
]
both = pytest.mark.parametrize("backend", ["cuda", "triton"])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)


@pytest.fixture(autouse=True)
def _exact_products():
    """fp32 products whole, the yardsticks' as well."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def features(count, m, d, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    for _ in range(count):
        x = torch.randn(m, d, device="cuda", generator=generator)
        yield F.normalize(x, dim=1).to(dtype).requires_grad_()


def gradients(backend, image, text, scale, **options):
    """Loss, dimage, dtext, dscale."""
    scale = torch.tensor(scale, device="cuda", requires_grad=True)
    with tinyclip.backend(backend):
        value = ops.contrastive_loss(image, text, scale, **options)
        return value.detach(), *torch.autograd.grad(value, (image, text, scale))


@both
@every_dtype
def test_the_rule(backend, dtype):
    tally = Tally()
    for seed in range(200):
        problem = contrastive.make(
            seed,
            device="cuda",
            dtypes=(dtype,),
            rows=(1, 2, 17, 64, 127, 128, 129, 300, 700),
            widths=(1, 8, 32, 100, 384, 500, 512, 640, 768, 1024),
            rounded_ds=True,
        )
        tally.add(problem.label, problem.judge(backend))
    tally.verdict()


@every_dtype
def test_two_engines_agree(dtype):
    """The second opinion: both within the rounding of dS of each other."""
    image, text, ti, tt = features(4, 1037, 512, dtype)
    teacher = tinyclip.Teacher(ti.detach(), tt.detach(), 50.0)
    found = [
        gradients(backend, image, text, 100.0, teacher=teacher, alpha=0.5)
        for backend in ("cuda", "triton")
    ]
    for x, y in zip(*found, strict=True):
        difference = (x.double() - y.double()).norm() / y.double().norm()
        assert difference <= 2 * torch.finfo(dtype).eps


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
@pytest.mark.parametrize("m", [46_341, 65_537])
def test_more_logits_than_32_bits_count(backend, m):
    """Against fp64 in chunks of rows."""
    image, text = features(2, m, 64)
    found = gradients(backend, image, text, 20.0)
    exact = [x.detach().double().requires_grad_() for x in (image, text)]
    for x, t in zip(found, gradients("torch", *exact, 20.0), strict=True):
        error = ((x.double() - t).norm() / t.norm()).item()
        assert error <= (1e-5 if x.dim() == 0 else 1e-2), error


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


@both
@pytest.mark.parametrize("with_teacher", [False, True])
def test_memory_at_32768(backend, with_teacher):
    """0.3 GB over the inputs and the gradients."""
    image, text, ti, tt = features(4, 32_768, 512)
    teacher = tinyclip.Teacher(ti.detach(), tt.detach(), 50.0) if with_teacher else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(backend, image, text, 50.0, teacher=teacher, alpha=0.5 if with_teacher else 0.0)
    used = torch.cuda.max_memory_allocated() - before - image.nbytes - text.nbytes
    print(f"{backend}: {used / 1e9:.3f} GB")
    assert used <= 0.3e9


@both
def test_a_batch_of_a_million(backend):
    """2^40 logits; identical pairs apart, so that the loss is known: log of the batch."""
    m = 1 << 20
    one = F.normalize(torch.ones(1, 512, device="cuda"), dim=1).bfloat16()
    image, text = (one.repeat(m, 1).requires_grad_() for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value, dimage, dtext, _ = gradients(backend, image, text, 20.0)
    used = torch.cuda.max_memory_allocated() - before - image.nbytes - text.nbytes
    print(f"{backend}: {used / 1e9:.2f} GB")
    torch.testing.assert_close(value.item(), 20 * 0.6931471805599453, rtol=1e-4, atol=0)
    assert used <= 4e9
    assert dimage.float().norm() < 1e-2
    assert dtext.float().norm() < 1e-2


@pytest.mark.skipif(HAS_GPU and torch.cuda.device_count() < 2, reason="one GPU is here")
@both
def test_the_tensors_device_is_not_the_current_one(backend):
    image, text = (x.detach().to("cuda:1").requires_grad_() for x in features(2, 300, 64))
    with tinyclip.backend(backend):
        value = ops.contrastive_loss(image, text, 10.0)
        value.backward()
    with tinyclip.backend("torch"):
        torch.testing.assert_close(value, ops.contrastive_loss(image, text, 10.0))
    assert torch.cuda.current_device() == 0


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
