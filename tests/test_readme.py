"""What the README shows runs as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_blocks_run_one_after_the_other():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["images"].shape == (8, 3, 32, 32)
    assert names["images"].isfinite().all()
    assert sorted(names["samples"]) == [names["first"], names["second"]]


def test_files_it_names_exist():
    root = Path(__file__).parents[1]
    named = re.findall(r"`((?:benchmarks|fastdiff|kernels|tests)/[\w./-]+)`|\((benchmarks/[\w./-]+)\)", README)
    named += [(f"benchmarks/results/{name}", "") for name in re.findall(r"`([\w-]+_\d{4}-\d\d-\d\d\.\w+)`", README)]
    assert len(named) >= 6
    assert [path for pair in named for path in pair if path and not (root / path).exists()] == []
