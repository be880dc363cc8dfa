"""Result files of one device made into one: its JSON, its page, its pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from benchmarks import store
from benchmarks.page import page


def write_report(files: list[Path], folder: Path) -> list[Path]:
    """Merge the files, later ones last, into folder/speed_<device>_<date>.{json,md,png}; returns what was written.

    Raises ValueError for a file that is no report, or of another device.
    """
    merged = store.merge([store.load(path) for path in files])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"speed_{merged['device']}_{merged['date']}.json"
    store.save(merged, path)
    return [path, *write_pages(merged, path)]


def write_pages(report: store.Report, path: Path) -> list[Path]:
    """The page and the pictures of a report beside its JSON at `path`; without matplotlib no pictures."""
    pictures: list[Path] = []
    if importlib.util.find_spec("matplotlib") is not None:
        from benchmarks.plots import draw

        pictures = draw(report, path.with_suffix(".png"))
    text = path.with_suffix(".md")
    text.write_text(page(report, [picture.name for picture in pictures]))
    return [text, *pictures]
