"""Tile sizes: the shipped table covers every problem; tuning is opt-in and kept."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tinyclip.triton_kernels import tiling, tuning
from tinyclip.triton_kernels.tuning import Kind, Tile


@pytest.mark.parametrize("kind", ["fwd", "bwd"])
def test_the_table_covers_every_problem(kind):
    for arch in (80, 86, 89, 90, 100, 103, 120):
        for bits in (16, 32):
            for d in (1, 16, 64, 65, 80, 128):
                for length in (1, 50, 77, 197, 257, 577, 5000):
                    for causal in (False, True):
                        tile = tuning.shipped(Kind(kind, arch, bits, d, length, causal))
                        assert tile.block_m >= 16
                        assert tile.block_n >= 16


def test_an_older_device_is_refused():
    with pytest.raises(ValueError, match=r"tables/attention.json, got Kind\(kind='fwd', arch=75"):
        tuning.shipped(Kind("fwd", 75, 16, 64, 50, False))


def test_the_newest_architecture_not_after_the_device_decides():
    key = Kind("bwd", 120, 16, 64, 197, False)
    assert tuning.shipped(key) == tuning.shipped(key._replace(arch=100))
    assert tuning.shipped(key._replace(arch=89)) == tuning.shipped(key._replace(arch=80))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [16, 48, 64])
def test_backward_on_an_h100_takes_the_measured_tiles(d, causal):
    one, two = Tile(64, 64, 4, 1), Tile(128, 128, 8, 1)
    wanted = {50: one, 64: one, 65: two, 77: two, 128: two, 129: one, 197: one, 257: one, 577: one}
    found = {n: tuning.shipped(Kind("bwd", 90, 16, d, n, causal)) for n in wanted}
    assert found == wanted


def test_a_measured_row_is_the_fastest_of_its_measurement():
    """To 1 %, of all tiles that the rows it names have timed."""
    results = Path(__file__).resolve().parents[1] / "bench" / "results"
    measured = [row for row in tuning.table() if row["source"] == "measured"]
    assert len(measured) == 3
    for row in measured:
        timed = json.loads((results / row["file"]).read_text())["rows"]
        assert row["rows"]
        for name in row["rows"]:
            ms = {r["who"]: min(r["raw_ms"]) for r in timed if f"{r['op']}/{r['case']}" == name}
            assert len(ms) >= 16, name
            assert ms[str(tuple(row["tile"]))] <= 1.01 * min(ms.values()), (name, row)


def test_without_opting_in_nothing_is_timed():
    key = Kind("fwd", 90, 16, 64, 197, False)

    def never(tile):
        raise AssertionError("timed")

    assert tuning.choose(key, never) == tuning.shipped(key)


@pytest.fixture
def autotune(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_measured", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_autotune_keeps_the_fastest_for_later_processes(autotune, monkeypatch):
    key = Kind("bwd", 90, 16, 64, 197, False)
    best = tuning.candidates(key)[-1]
    timed = []

    def milliseconds(tile):
        timed.append(tile)
        return 1.0 if tile == best else 2.0

    assert tuning.choose(key, milliseconds) == best
    assert timed == list(tuning.candidates(key))
    assert tuning.choose(key._replace(length=200), milliseconds) == best  # the same bucket
    assert len(timed) == len(tuning.candidates(key))
    monkeypatch.setattr(tuning, "_measured", {})  # another process
    assert tuning.choose(key, milliseconds) == best
    assert len(timed) == len(tuning.candidates(key))


def test_a_tile_without_room_is_passed_over(autotune):
    key = Kind("fwd", 90, 16, 64, 197, False)
    first, *others = tuning.candidates(key)

    def milliseconds(tile):
        if tile == first:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    assert tuning.choose(key, milliseconds) == others[0]

    def broken(tile):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        tuning.choose(key._replace(causal=True), broken)


@pytest.mark.parametrize("text", ["", "{", "[1]", json.dumps({"x": 3})])
def test_a_damaged_cache_is_measured_again(autotune, text):
    tuning._cache_file().parent.mkdir(parents=True)
    tuning._cache_file().write_text(text)
    key = Kind("fwd", 90, 16, 64, 197, False)
    assert tuning.choose(key, lambda tile: float(tile.block_m)) in tuning.candidates(key)


def test_tiles_cover_a_length_once():
    for length in range(1, 700):
        for block in (16, 32, 64, 128):
            tail = tiling.split(length, block)
            assert tail in (0, 16, 32)
            assert tail == 0 or tail < block
            covered = tiling.padded(length, block)
            assert length <= covered < length + block
            if tail:
                main = length // block * block
                assert main + tail == covered
                assert tiling.tiles(length, block) == length // block + 1
            assert tiling.ragged(length, block) == (tail == 0 and covered != length)


def test_useful_fraction_counts_the_tiles():
    assert tiling.useful_fraction(257, 257, 64, 64) == pytest.approx((257 / 272) ** 2)
    assert tiling.useful_fraction(50, 50, 64, 64) == pytest.approx((50 / 64) ** 2)
    # 77 causal in tiles of 64: the main rows see one tile of keys, the tail sees 64 + 16.
    useful = 77 * 78 / 2 / (64 * 64 + 16 * 80)
    assert tiling.useful_fraction(77, 77, 64, 64, causal=True) == pytest.approx(useful)
    assert Tile(64, 64, 4, 2).num_stages == 2
