"""docs/data.md is true: its Python runs."""

import re

from tests.data import make

TEXT = (make.ROOT / "docs" / "data.md").read_text()


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    space = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), space)
