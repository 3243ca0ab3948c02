"""The compile tier: every shipped Triton configuration, ahead of time, for every architecture."""

import pytest

pytest.importorskip("triton")

from bench import resources

PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_no_spills_and_room_in_shared_memory(part):
    bad, count = [], 0
    for name, arch, tile, problem, launch in list(resources.shipped_launches())[part::PARTS]:
        found = resources.resources(launch, arch)
        count += 1
        if found.spills or found.shared > resources.SHARED_LIMIT[arch] or found.blocks_per_sm < 1:
            bad.append((name, arch, tile, problem, found))
        if "bfloat16" in name and problem.products:
            wanted = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
            if min(tile.block_m, tile.block_n) >= 64:
                assert wanted in found.tensor_core, (name, arch, tile, found)
            else:  # a narrow tile is below wgmma's 64 rows
                assert "MMA" in found.tensor_core, (name, arch, tile, found)
    assert count > 5
    assert not bad, bad


@pytest.mark.parametrize("arch", resources.SHARED_LIMIT)
def test_contrastive_tiles_fit(arch):
    bad, count = [], 0
    for name, launch in resources.contrastive_launches():
        found = resources.resources(launch, arch)
        count += 1
        if found.spills or found.shared > resources.SHARED_LIMIT[arch] or found.blocks_per_sm < 1:
            bad.append((name, arch, found))
        if not name.startswith("merge"):
            wanted = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
            assert wanted in found.tensor_core, (name, arch, found)
    assert count == 14
    assert not bad, bad


def test_every_row_of_the_table_is_compiled():
    from tinyclip.triton_kernels import gelu_mlp
    from tinyclip.triton_kernels.tuning import Tile, table

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


def test_a_spill_is_seen():
    """The reader itself: 64 x 64 tiles of fp32 products by four warps cannot stay in registers."""
    import torch

    from tinyclip.triton_kernels.tuning import Tile

    launch = resources.attention_launch(
        "bwd", torch.float32, 128, resources.Problem(197), Tile(32, 32, 4, 1)
    )
    assert resources.resources(launch, 90).spills > 0
