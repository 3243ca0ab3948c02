"""Seeded bugs of inheritance, affinity mimicking, plans and evaluation: each is noticed."""

import pytest

from tests.support.mutants import Laboratory, Mutant

pytestmark = pytest.mark.soak

INHERIT, AFFINITY, STAGES, MASKS, PRUNE = (
    (f"tinyclip/distill/{name}.py", (f"tests/distill/test_{name}.py",))
    for name in ("inherit", "affinity", "stages", "masks", "prune")
)
CLIP = ("tinyclip/models/clip.py", ("tests/models/test_gates.py",))
RESUMED = (MASKS[0], ("tests/train/test_masks.py", "-k", "resumed or learns"))
UPDATE = ("tinyclip/train/update.py", ("tests/train/test_masks.py", "-k", "resumed or refused"))
LOOP = ("tinyclip/train/loop.py", RESUMED[1])
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
    mutant("no automatic copy", STAGES, "copy.deepcopy(source)", "source"),
    mutant("always from the start", STAGES, "else self.start_sparsity", "else had"),
    mutant("counted of itself", STAGES, "Masks(student.config, teacher)", "Masks(student.config)"),
    mutant("sparsities may fall", STAGES, "if stage.sparsity <= reached:", "if False:"),
    mutant(
        "another temperature",
        MASKS,
        "GAMMA, ZETA, BETA, EPSILON = -0.1, 1.1, 2 / 3",
        "GAMMA, ZETA, BETA, EPSILON = -0.1, 1.1, 1 / 3",
    ),
    mutant("not stretched", MASKS, "/ BETA) * (ZETA - GAMMA) + GAMMA", "/ BETA)"),
    mutant("settled by chance of one half", MASKS, "rank >= gone", "a > 0"),
    mutant("the largest go", MASKS, "a.argsort(stable=True)", "a.argsort(descending=True)"),
    mutant("hard survivors", MASKS, "torch.sigmoid(0.8 * a / BETA), 0.0)", "1.0, 0.0)"),
    mutant(
        "no channel may stay",
        MASKS,
        "settled_gate(self.channels, least=1)",
        "settled_gate(self.channels)",
    ),
    mutant(
        "hidden units count once",
        MASKS,
        "per_head * heads + 2 * hidden",
        "per_head * heads + hidden",
    ),
    mutant("heads without biases", MASKS, "(4 * original.width + 4) / original.width", "4"),
    mutant("a two-sided constraint", MASKS, "- sparsity).clamp(min=0)", "- sparsity).abs()"),
    mutant("no square", MASKS, "missing.square()", "missing"),
    mutant("multipliers descend", MASKS, '"maximize": True, ', ""),
    mutant("no bounds", MASKS, '"bounds": BOUNDS, ', ""),
    mutant("masks follow the schedule", MASKS, ', "scheduled": False', ""),
    mutant("masks decay", MASKS, '"weight_decay": 0.0, ', ""),
    mutant("one mask for all steps", MASKS, "np.array([seed, step]", "np.array([seed, 0]"),
    mutant("one mask for all seeds", RESUMED, "np.array([seed, step]", "np.array([0, step]"),
    mutant("evaluation is random", MASKS, "if self.training else", "if True else"),
    mutant("no ramp", RESUMED, "min(1.0, step / self.steps) if", "1.0 if"),
    mutant(
        "the step is not told",
        LOOP,
        "                    model.begin(state.step)",
        "                    pass",
    ),
    mutant("the end is not pruned", LOOP, "model.finished(), update", "clip, update"),
    mutant("masks are not restored", UPDATE, "named[name].data.copy_(value)", "pass"),
    mutant("masks need not be there", UPDATE, "        if missing:", "        if False:"),
    mutant("soft heads are lost", PRUNE, "(out * gate[heads].to(out.dtype)[:, None])", "out"),
    mutant("soft hidden units are lost", PRUNE, "out * gate[hidden].to(out.dtype)", "out * 1"),
    mutant(
        "norms are multiplied",
        PRUNE,
        "start + name: self.cut(value)",
        "start + name: self.cut(value, 0, True)",
    ),
    mutant(
        "q, k and v are one",
        PRUNE,
        "weight = attn.in_proj_weight.unflatten(0, by_head)",
        "weight = attn.in_proj_weight.unflatten(0, (-1, 3, self._head_dim)).transpose(0, 1)",
    ),
    mutant("constants are lost", PRUNE, "made[into] += constant", "pass"),
    mutant(
        "constants go to the last half",
        PRUNE,
        "                if tensors:\n",
        "                if False:\n",
    ),
    mutant(
        "constants go before ln_pre",
        PRUNE,
        'into = "visual.ln_pre.bias" if',
        'into = "visual.positional_embedding" if',
    ),
    mutant(
        "the projection is not multiplied",
        CLIP,
        "projection * gates.channels.to(projection.dtype)[:, None]",
        "projection",
    ),
    mutant("ln_pre sees all channels", CLIP, "self.ln_pre(x, channel_mask=kept)", "self.ln_pre(x)"),
    mutant(
        "ln_post sees all channels",
        CLIP,
        "self.ln_post(x[:, 0], channel_mask=kept)",
        "self.ln_post(x[:, 0])",
    ),
    mutant(
        "ln_final sees all channels",
        CLIP,
        "self.ln_final(x, channel_mask=kept)",
        "self.ln_final(x)",
    ),
    mutant(
        "the embedding is not multiplied", CLIP, "return x * gates.channels.to(x.dtype)", "return x"
    ),
    mutant(
        "recomputed without gates", CLIP, "use_reentrant=False, **given)", "use_reentrant=False)"
    ),
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
