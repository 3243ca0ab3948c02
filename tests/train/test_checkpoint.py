"""Folders that are whole or not there: order of writing, damage, full and read-only disks."""

import errno
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.train import tiny
from tinyclip.models import CheckpointError
from tinyclip.train import checkpoint


def small(part: Path) -> None:
    (part / "inner").mkdir()
    (part / "inner" / "a.bin").write_bytes(bytes(range(256)))
    (part / "b.json").write_text("{}\n")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_is_written_verifies(tmp_path):
    folder = tmp_path / "deep" / "one"
    checkpoint.commit(folder, small)
    checkpoint.verify(folder)
    assert tree(folder).keys() == {"inner/a.bin", "b.json", "manifest.sha256"}
    assert os.listdir(folder.parent) == ["one"]
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "-c", checkpoint.MANIFEST], cwd=folder)
        assert done.returncode == 0


def test_one_of_the_name_is_replaced(tmp_path):
    checkpoint.commit(tmp_path / "one", small)
    checkpoint.commit(tmp_path / "one", lambda part: (part / "c").write_text("new"))
    checkpoint.verify(tmp_path / "one")
    assert tree(tmp_path / "one").keys() == {"c", "manifest.sha256"}
    assert os.listdir(tmp_path) == ["one"]


def test_all_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    """Every file and folder is synced, then renamed, then the folder above is synced."""
    done = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda n: (done.append(os.readlink(f"/proc/self/fd/{n}")), fsync(n))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append("rename"), rename(a, b)))
    folder = tmp_path / "one"
    checkpoint.commit(folder, small)
    part = tmp_path / ".one.part"
    names = ("", "inner", "inner/a.bin", "b.json", "manifest.sha256")
    assert set(done[:5]) == {str(part / name).rstrip("/") for name in names}
    assert done[5:] == ["rename", str(tmp_path)]


def test_every_byte_counts(tmp_path):
    """Each byte of each file flipped, each file cut, emptied, removed, or one added: named."""
    folder = tmp_path / "one"
    checkpoint.commit(folder, small)
    for name, data in tree(folder).items():
        path = folder / name
        for place in range(len(data)):
            flipped = bytearray(data)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=r"one/"):
                checkpoint.verify(folder)
        for size in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            with pytest.raises(CheckpointError):
                checkpoint.verify(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=Path(name).name):
            checkpoint.verify(folder)
        path.write_bytes(data)
    (folder / "extra").write_text("")
    with pytest.raises(CheckpointError, match="extra: is not in the manifest"):
        checkpoint.verify(folder)
    (folder / "extra").unlink()
    checkpoint.verify(folder)


def write_steps(folder: Path, *numbers: int) -> None:
    for number in numbers:
        checkpoint.commit(folder / f"step_{number:08d}", small)


def test_latest_is_the_newest_whole_one(tmp_path, caplog):
    assert checkpoint.latest(tmp_path / "none") is None
    write_steps(tmp_path, 5, 40, 300)
    (tmp_path / ".step_00000400.part").mkdir()
    (tmp_path / "step_12").mkdir()
    assert checkpoint.latest(tmp_path).name == "step_00000300"
    assert not caplog.records
    (tmp_path / "step_00000300" / "b.json").write_text("{ \n")
    assert checkpoint.latest(tmp_path).name == "step_00000040"
    (warning,) = caplog.messages
    assert "step_00000300/b.json" in warning and "the checkpoint before it is used" in warning
    for number in (5, 40):
        (tmp_path / f"step_{number:08d}" / "manifest.sha256").unlink()
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints is whole"):
        checkpoint.latest(tmp_path)


def test_the_oldest_are_dropped(tmp_path):
    write_steps(tmp_path, 1, 2, 3, 10)
    checkpoint.prune(tmp_path, 2)
    assert list(checkpoint.steps(tmp_path)) == [3, 10]
    checkpoint.prune(tmp_path, 5)
    assert list(checkpoint.steps(tmp_path)) == [3, 10]


def test_leftovers_are_removed(tmp_path):
    write_steps(tmp_path, 1)
    for name in (".step_00000002.part", ".step_00000000.old"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
    checkpoint.clean(tmp_path)
    assert os.listdir(tmp_path) == ["step_00000001"]
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000001.part")
    write_steps(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step_00000001"]


@contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes: writes fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def failing(monkeypatch, name: str, code: int, after: int):
    """os.`name` raises from its call number `after` on."""
    real, calls = getattr(os, name), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) > after:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        yield
    assert calls


@pytest.mark.parametrize("size", [100, 2_000, 20_000])
def test_a_full_disk_leaves_the_old_ones(tmp_path, size):
    """Between 100 bytes, where the first file fails, and 20 kB, where only the optimizer does."""
    tiny.interrupted(tmp_path, at=4)
    before = tree(tmp_path / "checkpoints")

    def fill(step, model):
        if step == 6:
            limit.__enter__()

    limit = largest_file(size)
    try:
        with pytest.raises(OSError, match="step_00000006 could not be written, and nothing there"):
            tiny.fit(tmp_path, "latest", log_every=100, at_step=fill)
    finally:
        limit.__exit__(None, None, None)
    assert tree(tmp_path / "checkpoints") == before
    summary, model = tiny.fit(tmp_path, "latest")
    assert summary.steps == 12 and summary.samples == 96
    assert tiny.weights(model) == tiny.weights(tiny.fit(None)[1])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize(("name", "after"), [("fsync", 0), ("fsync", 4), ("rename", 0)])
def test_an_error_of_the_disk_leaves_the_old_ones(tmp_path, monkeypatch, code, name, after):
    write_steps(tmp_path, 1)
    before = tree(tmp_path)
    with failing(monkeypatch, name, code, after), pytest.raises(OSError) as caught:
        write_steps(tmp_path, 2)
    assert caught.value.errno == code and "step_00000002 could not be written" in str(caught.value)
    assert tree(tmp_path) == before


def test_a_folder_that_is_no_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="step_00000003 could not be written"):
        tiny.fit(tmp_path, "latest")
    assert (tmp_path / "checkpoints").read_text() == "in the way"


@pytest.mark.skipif(os.name != "posix", reason="permissions of a POSIX file system")
def test_a_read_only_folder(tmp_path):
    """As another user where the tests run as root, whom no permission stops."""
    tiny.interrupted(tmp_path, at=4)
    checkpoints = tmp_path / "checkpoints"
    before = tree(checkpoints)
    home = os.getcwd()
    os.chdir(checkpoints)
    os.chmod(checkpoints, 0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(PermissionError, match="step_00000006 could not be written"):
            write_steps(Path("."), 6)
    finally:
        if root:
            os.seteuid(0)
        os.chmod(checkpoints, 0o755)
        os.chdir(home)
    assert tree(checkpoints) == before
