"""Seeded bugs of accelerate: each is noticed."""

import pytest

from tests.support.mutants import Laboratory, Mutant

pytestmark = pytest.mark.soak

ROOT = "tinyclip/integrations"
TESTS = "tests/integrations/test_{}.py"
QUICK = ("-k", "not compiled and not graph and not compile")


def mutant(name: str, file: str, tests: str, old: str, new: str) -> Mutant:
    files = (TESTS.format(test) for test in tests.split())
    return Mutant(name, f"{ROOT}/{file}.py", old, new, (*files, *QUICK))


def in_a_graph(name: str, file: str, old: str, new: str) -> Mutant:
    return Mutant(name, f"{ROOT}/{file}.py", old, new, (TESTS.format("parity"), "-k", "compiled"))


BASE, MASKS, ACTIVATIONS = "swaps/base", "swaps/masks", "swaps/activations"
TORCH, HF, OPEN_CLIP, TIMM = (
    f"swaps/of_{library}" for library in ("torch", "transformers", "open_clip", "timm")
)
KNOWN, MAIN, ROUTE = "swaps/__init__", "accelerating", "hf"

MUTANTS = (
    mutant(
        "True is visible to all",
        MASKS,
        "masks",
        'if true_is == "visible" else ~mask',
        "if 1 else 0",
    ),
    mutant("any float is a mask", MASKS, "masks", "sound = (visible | (", "sound = (True | ("),
    mutant("the first query", MASKS, "masks", "visible[:, 0, -1]", "visible[:, 0, 0]"),
    mutant(
        "one head only",
        MASKS,
        "masks",
        "visible.unflatten(0, (-1, heads))",
        "visible[::heads, None]",
    ),
    mutant(
        "strictly causal",
        MASKS,
        "masks",
        "device=mask.device).tril()",
        "device=mask.device).tril(-1)",
    ),
    mutant("padding is dropped", MASKS, "masks", "None if everything else key_mask", "None"),
    mutant("an id is enough", MASKS, "masks", "seen[0]() is mask and ", ""),
    mutant("no version", MASKS, "masks", " and seen[1] == mask._version", ""),
    mutant("inference is cached", MASKS, "masks", "if mask.is_inference():", "if False:"),
    mutant("a learned bias", MASKS, "masks", "if mask.requires_grad:", "if False:"),
    mutant("weak references travel", MASKS, "masks", '| {"_seen": {}}', ""),
    in_a_graph("a graph knows no mask", MASKS, "if getattr(module, name) is mask:", "if False:"),
    mutant("erf is tanh", ACTIVATIONS, "activations", "CLOSE = 1e-10", "CLOSE = 1e-2"),
    mutant(
        "only near zero",
        ACTIVATIONS,
        "activations",
        "x = torch.cat([near, torch",
        "x, _ = (near, [near, torch",
    ),
    mutant(
        "only as it is",
        ACTIVATIONS,
        "activations",
        "for mode in (True, False)]",
        "for mode in (False,)]",
    ),
    mutant(
        "parameters are no matter", ACTIVATIONS, "activations", "*activation.parameters(), ", ""
    ),
    mutant("1.7 for 1.702", ACTIVATIONS, "activations", "1.702 * x", "1.7 * x"),
    mutant(
        "weights are not asked for",
        TORCH,
        "report",
        "if need_weights and self",
        "if False and self",
    ),
    mutant(
        "attention dropout is lost",
        TORCH,
        "report",
        "if p and training else None",
        "if False else None",
    ),
    mutant(
        "polarity of padding",
        TORCH,
        "parity",
        "key_mask = ~hidden if key_mask is None",
        "key_mask = hidden if key_mask is None",
    ),
    mutant(
        "no mask is odd",
        TORCH,
        "parity",
        "            if pattern is None:\n                return OTHER_MASK\n",
        "            pattern = pattern or (True, None)\n",
    ),
    mutant(
        "is_causal is forgotten",
        TORCH,
        "parity",
        "causal, key_mask = is_causal, None",
        "causal, key_mask = False, None",
    ),
    mutant("sequences first", TORCH, "parity", "if not self.batch_first:\n", "if False:\n"),
    mutant(
        "fp32 on a CPU",
        TORCH,
        "parity",
        'if x.device.type == "cpu" else None',
        "if False else None",
    ),
    mutant(
        "the dtype is lifted",
        TORCH,
        "parity",
        "if dtype is not None and y.dtype != dtype:",
        "if False:",
    ),
    mutant("eps is the default", TORCH, "parity", "eps=module.eps, ", ""),
    mutant("hooks on a norm", TORCH, "swaps", " and not has_hooks(norm)", ""),
    mutant(
        "a wrapped linear is read",
        TORCH,
        "swaps report",
        "if not is_plain(linear, nn.Linear):",
        "if False:",
    ),
    mutant(
        "the old activation", TORCH, "swaps", "if activation is not state.activation:", "if False:"
    ),
    mutant(
        "hooks on an activation",
        TORCH,
        "swaps",
        "isinstance(other, nn.Module) and has_hooks(other)",
        "False",
    ),
    mutant("hooks on a linear", BASE, "swaps", "        and not has_hooks(module)\n", ""),
    mutant(
        "what is inside is no matter",
        TORCH,
        "report",
        "if type(other) not in (nn.Identity, nn.Dropout):",
        "if False:",
    ),
    mutant("strict later is silent", BASE, "report", "if session.strict:", "if False:"),
    mutant("strict is silent", MAIN, "report", "if left or not (swaps or already):", "if False:"),
    mutant("a trace is left", BASE, "swaps", "    delattr(module, MARK)\n", ""),
    mutant(
        "copies lose their class",
        BASE,
        "swaps",
        "return _instance, self._parts, *rest",
        "return _instance, (self._parts[0], nn.Module), *rest",
    ),
    mutant(
        "slices are swapped",
        BASE,
        "swaps",
        "return cls._parts[1](*args, **kwargs)",
        "return super().__call__(*args, **kwargs)",
    ),
    mutant("restored under a wrapper", MAIN, "swaps", "    if covered:\n", "    if False:\n"),
    mutant("the scale of one", HF, "parity", "scale=scale,", "scale=1.0,"),
    mutant(
        "the caller is turned round",
        HF,
        "parity",
        "said is None else said",
        "said is None else not said",
    ),
    mutant("other implementations", HF, "swaps report", "if implementation == TAKEN:", "if True:"),
    mutant(
        "vision is causal",
        HF,
        "parity",
        "Pattern(bool(self._causal(kwargs)), None)",
        "Pattern(True, None)",
    ),
    mutant(
        "masks are ignored",
        HF,
        "parity",
        "if attention_mask is None:\n            return Pattern",
        "if True:\n            return Pattern",
    ),
    mutant(
        "the residual is normed", HF, "parity", "return x + self.mlp(y)", "return y + self.mlp(y)"
    ),
    mutant(
        "pooling asks for weights", MAIN, "parity", ".weights_read = False", ".weights_read = True"
    ),
    mutant(
        "scaled cosine passes",
        OPEN_CLIP,
        "report",
        "if module.logit_scale is not None:",
        "if False:",
    ),
    mutant(
        "head scales pass",
        OPEN_CLIP,
        "report",
        'return "scale_heads" if module.head_scale is not None else None',
        "return None",
    ),
    mutant(
        "padding by head is dropped", OPEN_CLIP, "parity", "or pattern.key_mask is not None ", ""
    ),
    mutant(
        "layer scale is dropped",
        OPEN_CLIP,
        "parity",
        "added(self.ln_2, self.ls_1(attended), q_x)",
        "added(self.ln_2, attended, q_x)",
    ),
    mutant(
        "qk_norm passes",
        TIMM,
        "report",
        'return "qk_norm"\n        return None',
        "return None\n        return None",
    ),
    mutant(
        "timm hides where True",
        TIMM,
        "parity",
        'read(attn_mask, "visible")',
        'read(attn_mask, "hidden")',
    ),
    mutant("the gate is shut", TIMM, "parity", "if self.gate is not None:", "if False:"),
    mutant(
        "stochastic depth is lost",
        TIMM,
        "parity",
        "self.drop_path1(self.ls1(attended))",
        "self.ls1(attended)",
    ),
    mutant(
        "subclasses are taken",
        KNOWN,
        "report",
        "if type(module).forward is not cls.forward:",
        "if False:",
    ),
    mutant("versions are no matter", KNOWN, "report", "if theirs != ours:", "if False:"),
    mutant(
        "another's forward is taken", KNOWN, "report", 'if "forward" in vars(module):', "if False:"
    ),
    mutant("strangers are not named", MAIN, "report", "if linears >= 2 and", "if linears >= 9 and"),
    mutant("check leaves eval mode", MAIN, "report", "module.training = mode", "pass"),
    mutant(
        "the mask has another name",
        ROUTE,
        "hf_attention",
        "AttentionMaskInterface.register(NAME,",
        'AttentionMaskInterface.register("other",',
    ),
    mutant(
        "padding is causal",
        ROUTE,
        "hf_attention",
        "return attention_mask if causal else",
        "return attention_mask if True else",
    ),
    mutant("dropout is lost by name", ROUTE, "hf_attention", "if dropout:", "if False:"),
    mutant(
        "causal is lost for sdpa",
        ROUTE,
        "hf_attention",
        "attention_mask[:, None, None, :] & past",
        "attention_mask[:, None, None, :] & (past | True)",
    ),
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    lab = Laboratory(tmp_path_factory.mktemp("mutants"))
    assert lab.passes("tests/integrations", *QUICK)
    return lab


@pytest.mark.parametrize("seeded", MUTANTS, ids=lambda one: one.name)
def test_noticed(laboratory, seeded):
    assert not laboratory.survives(seeded)
