"""Fixtures of the group-norm tests."""

from collections.abc import Iterator

import pytest

from fastdiff.kernels import group_norm, group_norm_backward, group_norm_plan
from fastdiff.kernels.layout import empty


@pytest.fixture(params=["one pass", "two passes"])
def form(request, monkeypatch) -> Iterator[str]:
    """Small planes in either form: the second with tiles of 512 elements and a few chunks of several steps."""
    monkeypatch.setattr(group_norm_plan, "DEFAULT_MULTIPROCESSORS", 1)
    if request.param == "two passes":
        monkeypatch.setattr(group_norm_plan, "MAX_TILE", 0)
        monkeypatch.setattr(group_norm_plan, "SPLIT_TILE", 512)
        monkeypatch.setattr(group_norm_plan, "PROGRAMS_PER_MULTIPROCESSOR", 6)
    group_norm_plan.choose_plan.cache_clear()
    group_norm_plan.multiprocessors_of.cache_clear()
    yield request.param
    monkeypatch.undo()
    group_norm_plan.choose_plan.cache_clear()
    group_norm_plan.multiprocessors_of.cache_clear()


@pytest.fixture
def nan_outputs(monkeypatch) -> None:
    """An element that no kernel writes shows up."""
    for module in (group_norm, group_norm_backward):
        monkeypatch.setattr(module, "empty", lambda *args, **options: empty(*args, **options).fill_(float("nan")))
