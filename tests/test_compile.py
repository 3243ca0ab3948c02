"""The compile tier: every shipped Triton configuration, ahead of time, for every architecture."""

import pytest
import torch

pytest.importorskip("triton")

from bench import resources
from tinyclip.triton_kernels.tuning import Tile

PARTS = 6
# Where ptxas has serialized wgmma: compiled every time, not in the soak tests alone.
CLIPS = ("50", "77", "77c", "197", "257", "577")


def _brief():
    """A launch of each kernel and architecture, and attention at CLIP's lengths on sm_90."""
    launches = list(resources.shipped_launches())
    last = {(name, arch): n for n, (name, arch, *_) in enumerate(launches)}
    for n, (name, arch, _, problem, _) in enumerate(launches):
        clips = (name[3:], arch) == (" bfloat16 D64", 90) and problem.shape in CLIPS
        if clips or last[name, arch] == n:
            yield launches[n]


def _check(launches):
    """No spills, room in shared memory, no wgmma that ptxas serializes, the products on tensor
    cores; how many were compiled."""
    bad, count = [], 0
    for name, arch, tile, problem, launch in launches:
        found = resources.resources(launch, arch)
        count += 1
        if faults := found.faults(arch, resources.may_spill_outside_loops(name, arch, tile)):
            bad.append((name, arch, tile, problem, faults, found))
        if "bfloat16" in name and problem.products:
            wanted = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
            if min(tile.block_m, tile.block_n) >= 64:
                assert wanted in found.tensor_core, (name, arch, tile, found)
            else:  # a narrow tile is below wgmma's 64 rows
                assert "MMA" in found.tensor_core, (name, arch, tile, found)
    assert not bad, bad
    return count


@pytest.mark.parametrize("part", range(PARTS))
def test_a_launch_of_every_kernel_is_fit_to_ship(part):
    assert _check(list(_brief())[part::PARTS]) > 5


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
def test_every_launch_is_fit_to_ship(part):
    assert _check(list(resources.shipped_launches())[part::PARTS]) > 30


@pytest.mark.parametrize("arch", resources.SHARED_LIMIT)
def test_contrastive_tiles_fit(arch):
    bad, count = [], 0
    for name, launch in resources.contrastive_launches():
        found = resources.resources(launch, arch)
        count += 1
        if faults := found.faults(arch):
            bad.append((name, arch, faults, found))
        if not name.startswith("merge"):
            wanted = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
            assert wanted in found.tensor_core, (name, arch, found)
    assert count == 14
    assert not bad, bad


def test_every_row_of_the_table_is_compiled():
    from tinyclip.triton_kernels import gelu_mlp
    from tinyclip.triton_kernels.tuning import table

    launches = resources.shipped_launches()
    compiled = {(name.split()[0], arch, tile) for name, arch, tile, *_ in launches}
    for row in table():
        assert (row["kind"], row["arch"], Tile(*row["tile"])) in compiled, row
        assert row["source"] in ("measured", "predicted")
    for row in table("gelu_mlp"):
        tile = gelu_mlp.Tile(*row["tile"])
        known = (f"mlp-{row['kind']}", row["arch"], tile) in compiled
        assert known or tile == gelu_mlp.Tile("pointwise"), row
        assert row["source"] in ("measured", "predicted")


def test_attention_is_compiled_at_clips_lengths():
    """Both ways at 50, 77 causal and not, 197, 257 and 577 tokens, where wgmma must not wait."""
    for launches, more in ((_brief(), ()), (resources.shipped_launches(), ("77cm", "97m", "577m"))):
        shapes = {"fwd": set(), "bwd": set()}
        for name, arch, _, problem, _ in launches:
            if name.endswith("bfloat16 D64") and arch == 90:
                shapes[name.split()[0]].add(problem.shape)
        assert {*CLIPS, *more} <= shapes["fwd"]
        assert {*CLIPS, *more} <= shapes["bwd"]


def test_the_brief_tier_leaves_no_kernel_out():
    every, brief = ({(n, a) for n, a, *_ in f()} for f in (resources.shipped_launches, _brief))
    assert every == brief


def test_a_spill_is_seen():
    """The reader itself: 32 x 32 tiles of fp32 products by four warps cannot stay in registers."""
    launch = resources.attention_launch(
        "bwd", torch.float32, 128, resources.Problem(197), Tile(32, 32, 4, 1)
    )
    found = resources.resources(launch, 90)
    assert found.spills > 0
    assert found.spills_in_loops > 0
    assert found.faults(90, spills_outside_loops=True) == ["spills"]


def test_spills_outside_loops_are_told_apart():
    lines = ["STL [R1], R2", "IADD R3, R3, 1", "LDL R4, [R1]", "@P0 BRA 0x10", "LDL R2, [R1]"]
    lines += ["EXIT", "BRA 0x60"]  # what follows the end branches to itself

    def sass(code):
        return "".join(f"        /*{16 * n:04x}*/    {t} ;\n" for n, t in enumerate(code))

    assert resources._spills_in_loops(sass(lines)) == 1
    assert resources._spills_in_loops(sass([*lines[:3], "NOP", *lines[4:]])) == 3
    assert resources._spills_in_loops(sass([*lines[:2], "NOP", *lines[3:]])) == 0


def test_serialized_wgmma_is_seen(tmp_path):
    """An accumulator that is written between wgmma and its wait, as ptxas has to find it."""
    wgmma = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16"
    ptx = f"""
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out) {{
  .reg .f32 %f<5>;
  .reg .b64 %d<2>;
  mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
  mov.b64 %d1, 0;
  wgmma.fence.sync.aligned;
  {wgmma} {{%f1, %f2, %f3, %f4}}, %d1, %d1, 1, 1, 1, 0, 0;
  BETWEEN
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  ld.param.u64 %d1, [out];
  st.global.v4.f32 [%d1], {{%f1, %f2, %f3, %f4}};
  ret;
}}
"""
    written = ptx.replace("BETWEEN", "add.f32 %f1, %f1, 0f3F800000;")
    assert resources._serialized(written, tmp_path).startswith("C75")
    assert resources._serialized(ptx.replace("BETWEEN", ""), tmp_path) == ""
