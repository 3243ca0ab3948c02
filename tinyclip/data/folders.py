"""A folder with one sub-folder a class, whose name is the caption."""

import os
from itertools import chain
from pathlib import Path

import numpy as np

from tinyclip.data.images import MOST_PIXELS, need_pillow, read_image
from tinyclip.data.source import FIRST, Sample, Source, Turn
from tinyclip.data.strings import Strings


class ClassFolders(Source):
    """Every file below ``root/class/`` is a sample of that class, hidden ones left out.

    Args:
        root: the folder; classes are its sub-folders, sorted by name.
        most_pixels: larger pictures are broken.

    Raises:
        NotADirectoryError: root is no folder.
        ValueError: there is no sub-folder, or no file in them.
    """

    def __init__(self, root: str | Path, *, most_pixels: int = MOST_PIXELS):
        need_pillow()
        self.root, self.most_pixels = Path(root), most_pixels
        folders = sorted(p for p in self.root.iterdir() if p.is_dir() and p.name[0] != ".")
        if not folders:
            raise ValueError(f"{self.root}: must hold one sub-folder a class, and holds none")
        self.classes = tuple(
            os.fsencode(folder.name).decode(errors="replace").replace("_", " ")
            for folder in folders
        )
        found = [_files(self.root, folder) for folder in folders]
        if not any(found):
            raise ValueError(f"{self.root}: no file is in any of its {len(folders)} sub-folders")
        self.labels = np.repeat(np.arange(len(folders)), [len(files) for files in found])
        self._files = Strings(chain.from_iterable(found))

    def __len__(self) -> int:
        return len(self._files)

    def listed(self) -> tuple[Strings | str, ...]:
        """See `Source.listed`."""
        return *self.classes, self._files

    def sample(self, index: int, turn: Turn = FIRST) -> Sample:
        """See `Source.sample`; the caption is the class's name, underscores as spaces."""
        name = self._files[index]
        image = read_image(self.root / name, name, self.most_pixels)
        return Sample(name, image, (self.classes[self.labels[index]],))


def _files(root: Path, folder: Path) -> list[str]:
    found = []
    for where, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if name[0] != "."]
        below = os.path.relpath(where, root)
        found += [os.path.join(below, name) for name in names if name[0] != "."]
    return sorted(found)
