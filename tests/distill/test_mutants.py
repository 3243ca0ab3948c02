"""Seeded bugs of inheritance, affinity mimicking, plans and evaluation: each is noticed."""

import pytest

from tests.support.mutants import Laboratory, Mutant

pytestmark = pytest.mark.soak

INHERIT, AFFINITY, STAGES = (
    (f"tinyclip/distill/{name}.py", (f"tests/distill/test_{name}.py",))
    for name in ("inherit", "affinity", "stages")
)
RANKING, RETRIEVAL, ZERO_SHOT, ENCODING, COMMAND = (
    (f"tinyclip/eval/{name}.py", (f"tests/eval/test_{test}.py",))
    for name, test in (
        ("ranking", "metrics"),
        ("retrieval", "metrics"),
        ("zero_shot", "zero_shot"),
        ("encoding", "zero_shot"),
        ("command", "command"),
    )
)
ACCURACY = (ZERO_SHOT[0], RANKING[1])


def mutant(name: str, where: tuple[str, tuple[str, ...]], old: str, new: str) -> Mutant:
    return Mutant(name, where[0], old, new, where[1])


FP32 = "block.float() @ candidates.float()"

MUTANTS = (
    mutant("no view by head", INHERIT, 'if ".in_proj_" not in name:', "if True:"),
    mutant("only the weight by head", INHERIT, '".in_proj_" not', '".in_proj_weight" not'),
    mutant("last channels", INHERIT, "(slice(size) for", "(slice(-size, None) for"),
    mutant("front layers", INHERIT, "max(1, len(layers) // max(1, count))", "1"),
    mutant("layers to the end", INHERIT, "[: count * step : step]", "[-count * step :: step]"),
    mutant("the rule skips stages", INHERIT, "(*through, student_layers)", "(student_layers,)"),
    mutant("through is skipped", INHERIT, "(*map(get_config, through), get", "(get"),
    mutant("the scale is inherited", INHERIT, 'if name == "logit_scale":', "if False:"),
    mutant("both towers always", INHERIT, "if _tower_of(name) in towers:", "if _tower_of(name):"),
    mutant("eps may differ", INHERIT, ', ("the eps", "layer_norm_eps", old, new)]', "]"),
    mutant("grids may differ", INHERIT, '"patch_size", "grid",', '"patch_size",'),
    mutant("the scale's shape", INHERIT, "nonscalar_logit_scale=scale.dim() == 1,", ""),
    mutant(
        "swapped scales",
        AFFINITY,
        "scale, teacher=teacher, alpha=alpha",
        "50.0, teacher=teacher, alpha=alpha",
    ),
    mutant(
        "the teacher's own scale", AFFINITY, "scale if self.teacher_scale is None", "scale if 1"
    ),
    mutant("not frozen", AFFINITY, "teacher.eval().requires_grad_(False)", "teacher.eval()"),
    mutant("the teacher drops out", AFFINITY, "teacher.eval().requires", "teacher.requires"),
    mutant("inference mode", AFFINITY, "@torch.no_grad()", "@torch.inference_mode()"),
    mutant("the teacher has gradients", AFFINITY, "    @torch.no_grad()\n", ""),
    mutant(
        "parts are swapped", AFFINITY, "(computed, rest) if light", "(computed, rest) if not light"
    ),
    mutant(
        "weights are swapped",
        AFFINITY,
        "alpha if light else 1 - alpha",
        "1 - alpha if light else alpha",
    ),
    mutant("no group", AFFINITY, "alpha=alpha, group=group)", "alpha=alpha)"),
    mutant("the parts have no group", AFFINITY, "alpha=light, group=group", "alpha=light"),
    mutant("images keep their type", AFFINITY, "image.to(parameter.dtype)", "image"),
    mutant("hard loss by default", AFFINITY, "alpha: float = 1.0", "alpha: float = 0.5"),
    mutant("stages do not follow", STAGES, "or previous is None else", "or True else"),
    mutant("no stage from the teacher", STAGES, 'if self.inherit == "teacher" or', "if"),
    mutant("no layers between", STAGES, "through=self.through, dtype", "dtype"),
    mutant("defaults go first", STAGES, "**inherited, **table", "**table, **inherited"),
    mutant("both lengths", STAGES, 'k not in ("epochs", "steps")', "True"),
    mutant("check stops early", STAGES, "start(original, previous)", "start(original); break"),
    mutant("ties count", RANKING, "(scores > best)", "(scores >= best)"),
    mutant("ties do not count", RANKING, "(wrong - place).clamp_min(0)", "(wrong - wrong)"),
    mutant("fp32 products", RANKING, "(block.double() @ candidates).float()", FP32),
    mutant("any right one", RANKING, "torch.inf).amax(1,", "torch.inf).clamp(-9).mean(1,"),
    mutant("k is one more", RANKING, "place < k - before", "place <= k - before"),
    mutant(
        "no answer is a hit",
        RANKING,
        "torch.stack(columns, 1), 0.0",
        "torch.stack(columns, 1), 1.0",
    ),
    mutant(
        "ways are swapped", RETRIEVAL, '"text_retrieval": hits(image', '"text_retrieval": hits(text'
    ),
    mutant(
        "the mean of all", ACCURACY, "(right / counts)[counts > 0]", "(right.sum() / counts.sum())"
    ),
    mutant(
        "absent classes count",
        ACCURACY,
        "(right / counts)[counts > 0]",
        "(right / counts.clamp_min(1))",
    ),
    mutant("acc5 of four", ACCURACY, "if c >= 5 else", "if c >= 4 else"),
    mutant("no last norm", ZERO_SHOT, "F.normalize(features", "torch.Tensor.float(features"),
    mutant(
        "prompts are mixed",
        ZERO_SHOT,
        "(0, (-1, len(templates))).mean(1)",
        "(0, (len(templates), -1)).mean(0)",
    ),
    mutant("names are formatted", ZERO_SHOT, 'replace("{}", name)', "format(name.format(0))"),
    mutant(
        "no norm",
        ENCODING,
        "return F.normalize(features.to(",
        "return torch.Tensor.float(features.to(",
    ),
    mutant(
        "normalised in 16 bit",
        ENCODING,
        "features.to(torch.promote_types(features.dtype, torch.float32))",
        "features",
    ),
    mutant("any keys are merged", ENCODING, "if rows_of_one and key", "if key"),
    mutant("rows are not merged", ENCODING, "isinstance(source, Table)", "False"),
    mutant("skipped in silence", ENCODING, "skipped.append(sample)", "pass"),
    mutant("random numbers are used", ENCODING, "generator=torch.Generator(),", ""),
    mutant("captions are cut", ENCODING, "sum(1).max()", "sum(1).min()"),
    mutant(
        "owners are wrong",
        COMMAND,
        "enumerate(encoded.captions) for _ in said",
        "enumerate(encoded.captions, -1) for _ in said",
    ),
    mutant("names by place", COMMAND, "and not set(own) & set(named)", ""),
    mutant("no mapping", COMMAND, "names = [named[caption] for caption in classes]", "pass"),
    mutant("nan in JSON", COMMAND, "None if math.isnan(value) else value", "value"),
    mutant("broken ones are fine", COMMAND, "    bad.check()\n", ""),
    mutant("templates are ignored", COMMAND, "names, templates, batch", "names, batch"),
    mutant(
        "only the shown captions", COMMAND, "list(own or sorted(", "list((own and ()) or sorted("
    ),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    lab = Laboratory(tmp_path_factory.mktemp("mutants"))
    assert lab.passes("tests/distill", "tests/eval")
    return lab


@pytest.mark.parametrize("seeded", MUTANTS, ids=lambda one: one.name)
def test_noticed(laboratory, seeded):
    assert not laboratory.survives(seeded)
