"""Plans: what is read from TOML, what is refused and how it is named, what a stage starts from."""

import json
from dataclasses import FrozenInstanceError

import pytest
import torch

import tinyclip
from tests.distill.test_inherit import B32, M40, M61, random, small
from tinyclip.distill import Plan, Ramp, Stage, inherit, prune, read_plan, sparsity_of
from tinyclip.models import get_config

PUBLISHED = f"""
[defaults]
epochs = 6
lr = 1e-4
warmup = 2000
logit_scale = 50

[[stage]]
name = "75"
model = "{M61}"

[[stage]]
name = "50"
model = "{M40}"
"""


AUTOMATIC = """
[defaults]
inherit = "auto"
epochs = 6
lr = 1e-4
logit_scale = 50
sparsity_warmup = 1000

[[stage]]
name = "75"
sparsity = 0.25
prune_at = 3000

[[stage]]
name = "50"
sparsity = 0.5
prune_at = 5000

[[stage]]
name = "25"
sparsity = 0.75
prune_at = 8000
"""


@pytest.fixture
def plan(tmp_path):
    def read(text: str) -> Plan:
        (tmp_path / "plan.toml").write_text(text)
        return read_plan(tmp_path / "plan.toml")

    return read


def test_published_schedule(plan):
    found = plan(PUBLISHED)
    shared = {"epochs": 6, "lr": 1e-4, "warmup": 2000, "alpha": 1.0, "logit_scale": 50}
    assert found == Plan(
        (
            Stage(name="75", config=get_config(M61), **shared),
            Stage(name="50", config=get_config(M40), **shared),
        )
    )
    found.check(get_config(B32))
    with pytest.raises(FrozenInstanceError):
        found.stages = ()


def test_published_automatic_schedule(plan):
    found = plan(AUTOMATIC)
    shared = {"epochs": 6, "lr": 1e-4, "logit_scale": 50, "sparsity_warmup": 1000}
    assert found == Plan(
        tuple(
            Stage(name=name, inherit="auto", sparsity=sparsity, prune_at=steps, **shared)
            for name, sparsity, steps in (("75", 0.25, 3000), ("50", 0.5, 5000), ("25", 0.75, 8000))
        )
    )
    found.check(get_config(B32))


def test_every_key(plan, tmp_path):
    config = small()
    (tmp_path / "student.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "folder.json").write_text(json.dumps({"model_cfg": config.to_dict()}))
    first, second, third = plan(
        """
        defaults = {epochs = 2, logit_scale = 50.0, alpha = 0.5, inherit = "teacher"}
        [[stage]]
        model = "student.json"
        steps = 300
        inherit = false
        logit_scale = "learned"
        [[stage]]
        name = "b.2_-"
        model = "folder.json"
        through = ["student.json", "ViT-B-32"]
        lr = 1
        warmup = 0
        alpha = 0
        inherit = true
        [[stage]]
        epochs = 0.5
        [stage.model]
        embed_dim = 64
        vision_cfg = {image_size = [16, 32], patch_size = 8, width = 128, layers = 4}
        text_cfg = {width = 128, heads = 2, layers = 3, context_length = 16, vocab_size = 600}
        """
    ).stages
    assert first == Stage(name="stage-1", config=config, inherit="none", steps=300, alpha=0.5)
    through = (config, get_config(B32))
    assert second == Stage(
        name="b.2_-", config=config, through=through, epochs=2, lr=1, warmup=0, alpha=0,
        logit_scale=50.0,
    )  # fmt: skip
    assert third.config.vision.image_size == (16, 32)
    assert (third.epochs, third.inherit, third.name) == (0.5, "teacher", "stage-3")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[stage]\n", "plan.toml: is not TOML: .*line 1"),
        ("", r"plan.toml: stage must be an array of tables, each \[\[stage\]\]"),
        ("stage = []", "stage must be an array of tables"),
        ("[stage]\nmodel = 'ViT-B-32'", "stage must be an array of tables"),
        ("[[stages]]\nmodel = 'ViT-B-32'", "key 'stages' is not known; did you mean 'stage'"),
        ("[default]\n", "key 'default' is not known; did you mean 'defaults'"),
        ("defaults = 3", "defaults must be a table"),
        ("[defaults]\nlearning = 1\n[[stage]]", r"\[defaults\]: key 'learning' is not known; keys"),
        ("[defaults]\nmodel = 'ViT-B-32'\n", r"\[defaults\]: key 'model' is not known"),
        ("[[stage]]\nlr = 1", "stage 1: key 'model' is missing"),
        ("[[stage]]\nmodel = 'a'\nwarm_up = 1", "stage 1: key 'warm_up' .* did you mean 'warmup'"),
        ("[[stage]]\nmodel = 'TinyCLIP-ViT-61M'", "stage 1: .*did you mean 'TinyCLIP-ViT-61M-32"),
        ("[[stage]]\nmodel = 'no.json'", "stage 1: model: .*no.json: no such file"),
        ("[[stage]]\nmodel = 3", "stage 1: get_config: model must be a name, a dict or"),
        ("[[stage]]\nmodel = {}", "stage 1: config: vision_cfg must be an object"),
    ],
)
def test_what_is_no_plan(plan, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("through = 'ViT-B-32'", "stage 1: through must be a list of models, got 'ViT-B-32'"),
        ("through = ['ViT']\n", "stage 1: get_config: model 'ViT' is not known"),
        ("inherit = 'prevous'", r"stage 1: Stage: inherit must be one of \('previous', 'teacher'"),
        ("inherit = false\nthrough = ['ViT-B-32']", "through must be empty where nobody inherits"),
        ("steps = 0", "steps must be an integer from 1 on, got 0"),
        ("steps = 1.5", "steps must be an integer from 1 on, got 1.5"),
        ("epochs = -1", "epochs must be a number above 0, got -1"),
        ("epochs = true", "epochs must be a number above 0, got True"),
        ("epochs = 1\nsteps = 1", "epochs or steps, not both, got 1 and 1"),
        ("lr = 'high'", "lr must be a number above 0, got 'high'"),
        ("lr = inf", "lr must be a number above 0, got inf"),
        ("warmup = -1", "warmup must be an integer from 0 on"),
        ("alpha = 1.5", "alpha must be a number from 0 to 1, got 1.5"),
        ("logit_scale = 'fixed'", "logit_scale must be above 0, got 'fixed'"),
        ("teacher_scale = 0", "teacher_scale must be above 0, got 0"),
        ("sparsity = 0.5", "sparsity must be left out where inherit is not 'auto', got 0.5"),
        ("mask_lr = 0.1", "mask_lr must be left out where inherit is not 'auto', got 0.1"),
        ("inherit = 'auto'", "config must be left out where masks choose it, got CLIPConfig"),
        ("name = 'a/b'", "name must be letters, digits, .* got 'a/b'"),
        ("name = '../x'", "name must be letters"),
        ("name = ''", "name must be letters"),
        ("name = 3", "name must be letters"),
        ("name = 'x'\n[[stage]]\nname = 'x'\nmodel = 'ViT-B-32'", "each of its own name, got"),
    ],
)
def test_what_is_no_stage(plan, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(f"[[stage]]\nmodel = 'ViT-B-32'\n{text}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "stage 1: Stage: sparsity must be a number between 0 and 1, got None"),
        ("sparsity = 1.0\nprune_at = 3", "sparsity must be a number between 0 and 1, got 1.0"),
        ("sparsity = true\nprune_at = 3", "sparsity must be a number between 0 and 1, got True"),
        ("sparsity = 0.5", "prune_at must be an integer from 1 on, got None"),
        ("sparsity = 0.5\nprune_at = 0", "prune_at must be an integer from 1 on, got 0"),
        ("sparsity = 0.5\nprune_at = 3\nwarmup = 2", "warmup must be left out .* prune_at, got 2"),
        ("sparsity = 0.5\nprune_at = 3\nstart_sparsity = 1", "start_sparsity must be in"),
        ("sparsity = 0.5\nprune_at = 3\nsparsity_warmup = -1", "sparsity_warmup must be an int"),
        ("sparsity = 0.5\nprune_at = 3\nmask_lr = 0", "mask_lr must be a number above 0, got 0"),
        ("sparsity = 0.5\nprune_at = 3\nthrough = ['ViT-B-32']", "through must be empty where ma"),
    ],
)
def test_what_is_no_automatic_stage(plan, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(f"[[stage]]\ninherit = 'auto'\n{text}")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.toml: no such file"):
        read_plan(tmp_path / "gone.toml")


def test_a_plan_that_cannot_be_run_is_refused_before_it_starts(plan):
    growing = plan(
        f"[[stage]]\nname = 'a'\nmodel = '{M40}'\n[[stage]]\nname = 'b'\nmodel = '{M61}'"
    )
    with pytest.raises(ValueError, match="stage 'b': inherit: the text tower must have at most"):
        growing.check(get_config(B32))
    from_teacher = f"[defaults]\ninherit = 'teacher'\n[[stage]]\nmodel = '{M40}'\n"
    plan(from_teacher + f"[[stage]]\nmodel = '{M61}'").check(get_config(B32))
    with pytest.raises(ValueError, match="stage '75': inherit: the image tower's patch_size"):
        plan(PUBLISHED).check(get_config("ViT-B-16"))
    with pytest.raises(ValueError, match="stage '75': inherit: the activation"):
        plan(PUBLISHED).check(get_config("ViT-B-32-quickgelu"))


def test_where_a_stage_starts():
    """From the student before, the teacher, or nobody; the depth rule is `through`'s."""
    teacher, previous, config = random(small()), random(small((3, 3), 24, 16)), small((2, 1), 8, 8)
    with torch.no_grad():
        for parameter in previous.parameters():
            parameter.add_(1)
    middle = small((3, 2), 24, 16)

    def start(*models, **options):
        torch.manual_seed(0)
        return Stage(name="x", config=config, **options).start(*models).state_dict()

    def same(found, wanted):
        return all(torch.equal(found[name], value) for name, value in wanted.items())

    torch.manual_seed(0)
    assert same(start(teacher), inherit(teacher, config).state_dict())
    assert same(start(teacher, previous), inherit(previous, config).state_dict())
    found = start(teacher, previous, inherit="teacher")
    assert same(found, inherit(teacher, config).state_dict())
    assert not same(found, inherit(previous, config).state_dict())
    found = start(teacher, inherit="teacher", through=(middle,))
    assert same(found, inherit(teacher, config, through=[middle]).state_dict())
    assert not same(found, inherit(teacher, config).state_dict())
    torch.manual_seed(0)
    fresh = tinyclip.create_model(config).state_dict()
    assert same(start(teacher, previous, inherit="none"), fresh)
    stage = Stage(name="x", config=config)
    assert stage.start(teacher, dtype=torch.float64).logit_scale.dtype == torch.float64


def test_an_automatic_stage_begins_with_all_of_its_source():
    """Weights and scale of the teacher, then of the student before; trained, and of no shared
    memory; its masks count the teacher's parameters, from what it has lost already."""
    teacher = random(small()).eval().requires_grad_(False)
    stage = Stage(name="x", inherit="auto", sparsity=0.5, prune_at=30)
    first = stage.start(teacher)
    state = teacher.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    assert first.training and all(p.requires_grad for p in first.parameters())
    assert first.logit_scale.data_ptr() != teacher.logit_scale.data_ptr()
    assert stage.start(teacher, dtype=torch.float64).logit_scale.dtype == torch.float64
    masked = stage.masked(first, teacher.config, seed=4)
    assert masked._target == Ramp(sparsity_of(small(), small()), 0.5, 10)
    assert (masked._seed, masked._lr, masked.clip) == (4, 0.02, first)

    gates = masked.masks.gates()
    for tower in gates:
        tower.channels[::2] = 0
    previous = prune(first, gates)
    had = sparsity_of(previous.config, small())
    assert 0.4 < had < 0.7
    later = Stage(
        name="y", inherit="auto", sparsity=0.8, prune_at=30, start_sparsity=0.75, mask_lr=0.1,
        sparsity_warmup=7,
    )  # fmt: skip
    second = later.start(teacher, previous)
    assert second.config == previous.config
    masked = later.masked(second, teacher.config)
    assert masked._target == Ramp(0.75, 0.8, 7) and masked._lr == 0.1
    assert masked.masks.sparsity().item() == pytest.approx(had, abs=1e-3)
    with pytest.raises(ValueError, match=r"above what the student begins with, 0\.\d{4}, got 0\.4"):
        Stage(name="z", inherit="auto", sparsity=0.4, prune_at=3).masked(second, teacher.config)


def test_automatic_stages_go_down(plan):
    with pytest.raises(
        ValueError, match=r"stage '50': .* above that of the stage before, 0\.25, got"
    ):
        plan(AUTOMATIC.replace("sparsity = 0.5", "sparsity = 0.2")).check(get_config(B32))
    mixed = f"[[stage]]\nmodel = '{M40}'\n[[stage]]\ninherit = 'auto'\nprune_at = 3\nsparsity = "
    plan(mixed + "0.8").check(get_config(B32))
    with pytest.raises(ValueError, match=r"stage 'stage-2': .* above what the student begins with"):
        plan(mixed + "0.2").check(get_config(B32))
