"""Seeded bugs of what only a GPU runs in dispatch, autocast and the `torch` backend."""

import pytest

from tests.support.mutants import Laboratory, Mutant

pytestmark = pytest.mark.soak

TORCH, LOSS, DISPATCH = (f"tinyclip/ops/{n}.py" for n in ("_torch", "contrastive", "_dispatch"))
FP64 = ("tests/ops/test_mixed_fp64.py",)
CHOICE = ("tests/contrastive/test_cuda.py", "-k", "architecture or reasons")
AUTOCAST = ("tests/contrastive/test_autocast.py",)
PRODUCTS = ("tests/contrastive/test_torch_products.py",)
SDPA = ("tests/ops/test_sdpa_alignment.py",)
YARDSTICK = ("tests/ops/test_yardstick.py",)
PROBLEM, RULE = "tests/support/problem.py", "tests/support/rule.py"

MUTANTS = (
    Mutant(
        "only the leading tensor is looked at",
        DISPATCH,
        "if not has_fp64:",
        "if False:",
        FP64,
    ),
    Mutant(
        "what is not differentiable does not count",
        DISPATCH,
        "differentiable + others",
        "differentiable",
        FP64,
    ),
    Mutant(
        "the scales do not count",
        LOSS,
        "return (scale,) if teacher is None",
        "return () if True",
        FP64,
    ),
    Mutant(
        "the weights do not count",
        LOSS,
        "teacher if alpha > 0 else None), row_weight, col_weight)",
        "teacher if alpha > 0 else None),)",
        FP64,
    ),
    Mutant(
        "a teacher that is not read counts",
        LOSS,
        "_scales(logit_scale, teacher if alpha > 0 else None)",
        "_scales(logit_scale, teacher)",
        FP64,
    ),
    Mutant("every architecture serves", LOSS, "if major == _MEASURED_MAJOR:", "if True:", CHOICE),
    Mutant("no architecture serves", LOSS, "if major == _MEASURED_MAJOR:", "if False:", CHOICE),
    Mutant(
        "newer ones serve, too",
        LOSS,
        "if major == _MEASURED_MAJOR:",
        "if major >= _MEASURED_MAJOR:",
        CHOICE,
    ),
    Mutant("nothing is cast", LOSS, "features = like_linear(*features)", "pass", AUTOCAST),
    Mutant(
        "the teacher is not cast",
        LOSS,
        "features = like_linear(*features)",
        "features = (*like_linear(image, text), *teacher[:2])",
        AUTOCAST,
    ),
    Mutant(
        "fp64 is left, the rest is cast",
        LOSS,
        "if not any(x is not None and x.dtype == torch.float64 for x in features):",
        "if True:",
        AUTOCAST,
    ),
    Mutant(
        "a pass casts, too",
        LOSS,
        "_check_offset(op, offset, a, b)\n    a, b, *teacher[:2] =",
        "_check_offset(op, offset, a, b)\n    a, b = like_linear(a, b)\n    a, b, *teacher[:2] =",
        AUTOCAST,
    ),
    Mutant("16 bit is lifted", TORCH, "_on_cuda(a) and own.itemsize == 2", "False", PRODUCTS),
    Mutant("16 bit whatever the logits are", TORCH, " and acc == torch.float32", "", PRODUCTS),
    Mutant("a CPU multiplies 16 bit", TORCH, "_on_cuda(a) and own", "own", PRODUCTS),
    Mutant(
        "b decides alone",
        TORCH,
        "own = torch.promote_types(a.dtype, b.dtype)",
        "own = b.dtype",
        PRODUCTS,
    ),
    Mutant(
        "dS has no unit",
        TORCH,
        "unit = ds_unit(features.dtype, row_weight, col_weight)",
        "unit = torch.ones_like(scale)",
        PRODUCTS,
    ),
    Mutant("fp16 has no room", "tinyclip/ops/_ds_unit.py", " * 2.0**-13", "", PRODUCTS),
    Mutant(
        "the unit is not given back", TORCH, "factor = scale * unit", "factor = scale", PRODUCTS
    ),
    Mutant("dscale stays in units", TORCH, "dscale *= unit", "pass", PRODUCTS),
    Mutant("dS is not rounded", TORCH, "ds = _cast(ds, features.dtype)", "pass", PRODUCTS),
    Mutant(
        "PyTorch rounds the products",
        TORCH,
        "torch.mm(x, y, out_dtype=acc)",
        "torch.mm(x, y)",
        PRODUCTS,
    ),
    Mutant(
        "the address is not looked at",
        TORCH,
        "readable = x.storage_offset() % step == 0",
        "readable = True",
        SDPA,
    ),
    Mutant("strides are not looked at", TORCH, "stride % step != 0 or ", "", SDPA),
    Mutant("expanded gradients are read", TORCH, "(gradient and stride == 0)", "False", SDPA),
    Mutant(
        "gradients are not looked at",
        TORCH,
        "return _readable(gradient.transpose(1, 2), gradient=True).transpose(1, 2)",
        "return gradient",
        SDPA,
    ),
    Mutant(
        "everything is copied", TORCH, "return x if readable else x.clone(", "return x.clone(", SDPA
    ),
    Mutant(
        "a copy keeps the strides",
        TORCH,
        "x.clone(memory_format=torch.contiguous_format)",
        "x.clone()",
        SDPA,
    ),
    Mutant(
        "keys are forgotten",
        TORCH,
        "_readable(q), _readable(k), _readable(v)",
        "_readable(q), k, _readable(v)",
        SDPA,
    ),
    Mutant("a CPU copies", TORCH, "    if not _on_cuda(x):\n        return x\n", "", SDPA),
    Mutant(
        "an odd row may lie anywhere",
        TORCH,
        "readable = readable and x.is_contiguous()",
        "pass",
        SDPA,
    ),
    Mutant("a peer's failure is silent", PROBLEM, "return [], (note,)", "return [], ()", YARDSTICK),
    Mutant("peers read our views", PROBLEM, "if not on_gpu(tensor):", "if True:", YARDSTICK),
    Mutant(
        "the verdict names nobody",
        RULE,
        'label = f"{label}: {name}{_notes(found)}"',
        'label = f"{label}: {name}"',
        YARDSTICK,
    ),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    made = Laboratory(tmp_path_factory.mktemp("mutants"))
    for tests in {mutant.tests for mutant in MUTANTS}:
        assert made.passes(*tests), tests
    return made


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_is_noticed(mutant, laboratory):
    assert not laboratory.survives(mutant)
