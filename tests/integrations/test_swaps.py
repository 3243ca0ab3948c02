"""What does not change: names, objects, hooks, copies, files, wrappers, others' classes."""

import copy
import io
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tinyclip
from tests.integrations import build
from tinyclip.integrations.swaps import SWAPS
from tinyclip.integrations.swaps.base import is_swapped

LIBRARIES = pytest.mark.parametrize("name", ["hf_clip", "open_clip", "timm", "openai"])


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def attributes(model: nn.Module) -> list[dict]:
    return [
        {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for module in model.modules()
    ]


def same_outputs(host: build.Host, model: nn.Module, other: nn.Module) -> bool:
    return all(
        build.distance(*pair) < 1e-13 for pair in zip(host.run(model), host.run(other), strict=True)
    )


@LIBRARIES
def test_parameters_and_buffers_are_the_same_objects_under_the_same_names(name):
    host = build.HOSTS[name]()
    model = host.model
    before = [dict(model.named_parameters()), dict(model.named_buffers()), model.state_dict()]
    structure = [(path, id(module)) for path, module in model.named_modules()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    tinyclip.accelerate(model)
    after = [dict(model.named_parameters()), dict(model.named_buffers()), model.state_dict()]
    for old, new in zip(before[:2], after[:2], strict=True):
        assert list(old) == list(new)
        assert all(old[key] is new[key] for key in old)
    assert list(before[2]) == list(after[2])
    assert all(before[2][key].data_ptr() == after[2][key].data_ptr() for key in before[2])
    assert structure == [(path, id(module)) for path, module in model.named_modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    build.gradients(host, model)
    optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True)]
    assert all(moved)


@LIBRARIES
def test_restore_leaves_no_trace(name):
    host = build.HOSTS[name]()
    model = host.model
    untouched = copy.deepcopy(model)
    kinds, found = classes(model), attributes(model)
    count = sum(row.count for row in tinyclip.accelerate(model).replaced)
    assert classes(model) != kinds
    assert sum(map(is_swapped, model.modules())) == count == sum(host.swapped.values())
    assert tinyclip.restore(model) == count
    assert classes(model) == kinds
    now = attributes(model)
    assert [list(one) for one in now] == [list(one) for one in found]
    assert all(a[key] is b[key] for a, b in zip(now, found, strict=True) for key in a)
    for ours, theirs in zip(model.modules(), untouched.modules(), strict=True):
        assert list(vars(ours)) == list(vars(theirs))
    assert all(torch.equal(*p) for p in zip(host.run(model), host.run(untouched), strict=True))
    assert tinyclip.restore(model) == 0


@LIBRARIES
def test_a_second_time_changes_nothing(name):
    host = build.HOSTS[name]()
    first = tinyclip.accelerate(host.model)
    kinds = classes(host.model)
    second = tinyclip.accelerate(host.model)
    assert classes(host.model) == kinds
    assert not second.replaced
    assert second.already == sum(row.count for row in first.replaced)
    assert second.skipped == first.skipped
    tinyclip.restore(host.model)
    assert not any(map(is_swapped, host.model.modules()))


@pytest.mark.parametrize("name", build.HOSTS)
def test_no_class_of_a_library_changes(name):
    """Every class and function of the modules that are swapped, and of torch.nn, stays itself."""
    host = build.HOSTS[name]()
    places = {place for place, *_ in SWAPS} | {"torch.nn.functional", "torch.nn.modules.container"}
    places = [sys.modules[place] for place in sorted(places) if place in sys.modules]
    assert len(places) >= 3

    def body(cls):
        return {key: value for key, value in vars(cls).items() if key != "__slotnames__"}

    def picture():
        return {
            (place.__name__, key): (value, body(value) if isinstance(value, type) else None)
            for place in places
            for key, value in vars(place).items()
        }

    before = picture()
    other = copy.deepcopy(host.model)
    tinyclip.accelerate(host.model)
    host.run(host.model)
    after = picture()
    assert before.keys() == after.keys()
    for key, (value, contents) in before.items():
        assert after[key][0] is value, key
        assert after[key][1] == contents, key
    assert not any(map(is_swapped, other.modules()))
    fresh = (nn.LayerNorm(4), nn.MultiheadAttention(4, 2), nn.Sequential(nn.Linear(4, 4)))
    assert not any(map(is_swapped, fresh))


def stored(model: nn.Module, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@LIBRARIES
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_computes_alike_and_on_its_own(name, how):
    host = build.HOSTS[name]()
    tinyclip.accelerate(host.model)
    expected = host.run(host.model)
    model = stored(host.model, how)
    assert classes(model) == classes(host.model)
    with torch.no_grad():  # a copy that still looked at the original would show it now
        for parameter in host.model.parameters():
            parameter.fill_(float("nan"))
    outputs = host.run(model)
    assert all(build.distance(*pair) < 1e-13 for pair in zip(outputs, expected, strict=True))
    assert tinyclip.restore(host.model) == sum(map(is_swapped, model.modules()))
    assert tinyclip.restore(model) > 0


def test_a_shallow_copy_has_its_own_parameters():
    """As nn.DataParallel makes one for each device, by hand."""
    theirs = build.stirred(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
    model = copy.deepcopy(theirs)
    tinyclip.accelerate(model)
    x = torch.randn(2, 4).double()
    for shallow in (copy.copy(model), model._replicate_for_data_parallel()):
        assert is_swapped(shallow)
        shallow._modules = {key: copy.deepcopy(child) for key, child in theirs.named_children()}
        shallow._modules["0"].weight.data.mul_(2)
        expected = nn.Sequential(*copy.deepcopy(list(shallow._modules.values())))(x)
        if shallow._modules["1"] is not model._modules["1"]:
            assert build.distance(shallow(x), expected) < 1e-13
        assert build.distance(model(x), theirs(x)) < 1e-13


def test_what_a_swapped_class_constructs_is_the_host_s():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    norm = nn.LayerNorm(4)
    for one in (model, norm):
        tinyclip.accelerate(one)
        assert is_swapped(one)
    part = model[:2]
    assert type(part) is nn.Sequential
    assert part(torch.ones(1, 4)).shape == (1, 8)
    assert type(type(norm)(6)) is nn.LayerNorm


@LIBRARIES
def test_checkpoints_go_both_ways(name, tmp_path):
    """Saved with and loaded without, and the other way round, strictly."""
    host = build.HOSTS[name]()
    plain = copy.deepcopy(host.model)
    tinyclip.accelerate(host.model)
    for source, target in ((host.model, plain), (plain, host.model)):
        build.stirred(source, seed=9)
        torch.save(source.state_dict(), tmp_path / "weights.pt")
        target.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert same_outputs(host, host.model, plain)


def test_save_pretrained_both_ways(tmp_path):
    transformers = pytest.importorskip("transformers")
    host = build.hf_clip()
    plain = copy.deepcopy(host.model)
    tinyclip.accelerate(host.model)
    host.model.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    back = transformers.CLIPModel.from_pretrained(tmp_path / "ours").double().eval()
    tinyclip.accelerate(back)
    assert same_outputs(host, back, plain.eval())


@pytest.mark.parametrize("first", ["accelerate", "compile"])
def test_compile_before_or_after(first):
    """A graph is compiled again when a module's class changes, whichever way."""
    library = pytest.importorskip("open_clip.transformer")
    model = build.stirred(library.ResidualAttentionBlock(24, 2))
    x = torch.randn(2, 5, 24).double()
    expected = model(x)
    if first == "accelerate":
        tinyclip.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if first == "compile":
        compiled(x)
        assert tinyclip.accelerate(compiled).replaced
    for _ in range(2):
        assert build.distance(compiled(x), expected) < 1e-13
        tinyclip.restore(compiled)


def test_before_and_after_to():
    """`.to` replaces buffers: the held mask is another tensor then, and still known."""
    host = build.open_clip_clip()
    plain = copy.deepcopy(host.model).float().double()
    host.model.float()
    report = tinyclip.accelerate(host.model)
    held = host.model.attn_mask
    host.model.double()
    assert host.model.attn_mask is not held
    assert same_outputs(host, host.model, plain)
    assert not report.declined


def test_on_the_meta_device_first():
    library = pytest.importorskip("open_clip")
    with torch.device("meta"):
        model = library.CLIP(**build.OPEN_CLIP)
    report = tinyclip.accelerate(model)
    assert len(report.replaced) == 4
    host = build.open_clip_clip()
    model.to_empty(device="cpu").double()
    model.attn_mask.copy_(torch.full((12, 12), -torch.inf).triu(1))
    model.load_state_dict(host.model.state_dict())
    assert same_outputs(host, model, host.model)
    assert not report.declined


class LoRA(nn.Module):
    """What PEFT puts in a linear's place: the same attributes, another forward."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features).double() * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, 2).double() * 0.3)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


ADAPTED = {
    "hf_clip": ("q_proj", "v_proj", "fc1", "fc2"),
    "open_clip": ("c_fc", "c_proj"),
    "timm": ("qkv", "proj", "fc1", "fc2"),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_in_a_linear_s_place_counts(name, order):
    """The weight of a wrapped linear is there to be read, and reading it would drop the adapter."""
    host = build.HOSTS[name]()
    torch.manual_seed(0)

    def adapt():
        for module in list(host.model.modules()):
            for key, child in list(module.named_children()):
                if key in ADAPTED[name] and isinstance(child, nn.Linear):
                    setattr(module, key, LoRA(child))

    if order == "before":
        adapt()
    report = tinyclip.accelerate(host.model)
    if order == "after":
        adapt()
    plain = copy.deepcopy(host.model)
    tinyclip.restore(plain)
    ours, our_gradients = build.gradients(host, host.model)
    theirs, their_gradients = build.gradients(host, plain)
    assert all(build.distance(*pair) < 1e-13 for pair in zip(ours, theirs, strict=True))
    build.assert_same(our_gradients, their_gradients)
    assert any("down" in key for key in our_gradients)
    said = {row.reason for row in report.skipped} | {reason for _, reason in report.declined}
    assert said == {"LoRA is no plain torch.nn.Linear"}


@pytest.mark.parametrize("where", ["fc1", "activation_fn", "layer_norm2", "self_attn", "mlp"])
def test_hooks_fire_as_before(where):
    """Also those on what a fused op would leave out: then the host computes it."""
    host = build.hf_clip()
    plain = copy.deepcopy(host.model)
    tinyclip.accelerate(host.model)
    seen: dict[int, list] = {}
    for one in (host.model, plain):
        found = seen.setdefault(id(one), [])
        for module_name, module in one.named_modules():
            if module_name.endswith(where):
                module.register_forward_hook(lambda m, a, out, f=found: f.append(build.of(out)[0]))
                module.register_forward_pre_hook(lambda m, a, f=found: f.append(torch.ones(1)))
        host.run(one)
    ours, theirs = seen.values()
    assert len(ours) == len(theirs) == 8
    assert all(build.distance(*pair) < 1e-13 for pair in zip(ours, theirs, strict=True))


def test_a_hook_that_changes_what_passes():
    """Activation patching and the like: the change arrives."""
    host = build.open_clip_clip()
    tinyclip.accelerate(host.model)
    plain = copy.deepcopy(host.model)
    tinyclip.restore(plain)
    for one in (host.model, plain):
        block = one.transformer.resblocks[0]
        block.ln_2.register_forward_hook(lambda m, a, out: out * 2)
        block.mlp.gelu.register_forward_hook(lambda m, a, out: out + 1)
    assert same_outputs(host, host.model, plain)


def test_hidden_states_and_weights_as_transformers_gives_them():
    """Its hooks find classes by isinstance; sdpa has no weights, eager has, with and without us."""
    host = build.hf_clip(padded=True)
    inputs = {"input_ids": build.ids(), "attention_mask": build.padding()}
    plain = copy.deepcopy(host.model)
    tinyclip.accelerate(host.model)
    ours, theirs = (
        one.text_model(**inputs, output_hidden_states=True) for one in (host.model, plain)
    )
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    pairs = zip(ours.hidden_states, theirs.hidden_states, strict=True)
    assert all(build.distance(*pair) < 1e-13 for pair in pairs)
    del inputs["attention_mask"]  # with it, eager gives NaN where a query sees no key
    for one in (host.model, plain):
        one.set_attn_implementation("eager")
    ours, theirs = (one.text_model(**inputs, output_attentions=True) for one in (host.model, plain))
    assert len(ours.attentions) == len(theirs.attentions) == 2
    pairs = zip(ours.attentions, theirs.attentions, strict=True)
    assert all(build.distance(*pair) < 1e-13 for pair in pairs)


def test_another_activation_put_there_later():
    host = build.hf_clip()
    report = tinyclip.accelerate(host.model)
    for module in host.model.modules():
        if type(module).__name__ == "CLIPMLP":
            module.activation_fn = nn.ReLU()
    plain = copy.deepcopy(host.model)
    tinyclip.restore(plain)
    assert same_outputs(host, host.model, plain)
    assert report.declined == {("CLIPMLP", "the activation was replaced since"): 4}


@pytest.fixture
def group(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_inside_ddp(group):
    host = build.open_clip_clip()
    theirs, their_gradients = build.gradients(host, host.model)
    tinyclip.accelerate(host.model)
    wrapped = nn.parallel.DistributedDataParallel(host.model)
    ours, our_gradients = build.gradients(host, wrapped)
    our_gradients = {key.removeprefix("module."): g for key, g in our_gradients.items()}
    assert all(build.distance(*pair) < 1e-13 for pair in zip(ours, theirs, strict=True))
    build.assert_same(our_gradients, their_gradients)
    assert tinyclip.restore(wrapped) > 0


def test_inside_fully_shard(group):
    """Blocks sharded whole, and one linear and one norm apart, whose weights are not there yet."""
    from torch.distributed.fsdp import fully_shard

    host = build.hf_vit()
    expected = host.run(host.model)
    report = tinyclip.accelerate(host.model)
    first, second = (m for m in host.model.modules() if type(m).__name__ == "ViTLayer")
    fully_shard(first.mlp.fc1)
    fully_shard(first.layernorm_after)
    for part in (first, second, host.model):
        fully_shard(part)
    outputs = host.run(host.model)
    assert all(build.distance(*pair) < 1e-12 for pair in zip(outputs, expected, strict=True))
    sum(out.sum() for out in outputs).backward()
    assert all(p.grad is not None for p in host.model.parameters())
    assert {reason for _, reason in report.declined} == {"FSDPLinear is no plain torch.nn.Linear"}
    with pytest.raises(RuntimeError, match="restore before"):
        tinyclip.restore(host.model)
