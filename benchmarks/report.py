"""Result files of one device made into one: its JSON, its page, its pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from benchmarks import store
from benchmarks.page import page


def write_report(files: list[Path], folder: Path) -> list[Path]:
    """Merge the files, later ones last, into folder/speed_<device>_<date>.{json,md,png}; returns what was written.

    Without matplotlib there are no pictures. Raises ValueError for a file that is no report, or of another device.
    """
    merged = store.merge([store.load(path) for path in files])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"speed_{merged['device']}_{merged['date']}.json"
    store.save(merged, path)
    pictures: list[Path] = []
    if importlib.util.find_spec("matplotlib") is not None:
        from benchmarks.plots import draw

        pictures = draw(merged, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(page(merged, [picture.name for picture in pictures]))
    return [path, path.with_suffix(".md"), *pictures]
