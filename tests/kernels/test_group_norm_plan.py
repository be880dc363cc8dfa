"""The rule that lays a group normalisation out over programs."""

import itertools

import pytest

from fastdiff.kernels.group_norm_plan import MAX_CHUNKS, MAX_TILE, Plan, choose_plan

BATCHES, POSITIONS = (1, 2, 16, 256), (1, 16, 64, 81, 1024, 4096, 16384, 65537)
CHANNELS = ((128, 32), (256, 32), (320, 32), (640, 32), (1920, 32), (2560, 32), (30, 3), (7, 7), (64, 1), (96, 96))
EVERY = list(itertools.product(BATCHES, POSITIONS, CHANNELS, (2, 4), (1, 2)))


def choose(batch: int, positions: int, channels: int, num_groups: int, itemsize: int, tensors: int = 1) -> Plan:
    return choose_plan(batch, positions, channels, num_groups, itemsize, 132, tensors)


def test_programs_cover_everything_once():
    for batch, positions, (channels, num_groups), itemsize, tensors in EVERY:
        plan = choose(batch, positions, channels, num_groups, itemsize, tensors)
        assert plan.groups * (channels // num_groups) <= plan.lanes
        assert (plan.blocks - 1) * plan.groups < num_groups <= plan.blocks * plan.groups
        chunk = plan.rows * plan.steps
        assert (plan.chunks - 1) * chunk < positions <= plan.chunks * chunk


def test_tiles_are_powers_of_two_that_fit():
    for batch, positions, (channels, num_groups), itemsize, tensors in EVERY:
        plan = choose(batch, positions, channels, num_groups, itemsize, tensors)
        for size in (plan.rows, plan.lanes, plan.num_warps):
            assert size & (size - 1) == 0
        assert plan.rows * plan.lanes * tensors <= MAX_TILE
        assert plan.rows * plan.lanes * tensors <= 64 * 32 * plan.num_warps
        assert plan.num_warps <= 16
        assert plan.chunks <= MAX_CHUNKS
        if plan.one_pass:
            assert (plan.steps, plan.chunks) == (1, 1)


def test_rows_start_on_16_bytes_where_any_do():
    for batch, positions, (channels, num_groups), itemsize, tensors in EVERY:
        plan = choose(batch, positions, channels, num_groups, itemsize, tensors)
        if channels * itemsize % 16 == 0 and plan.blocks > 1:
            assert plan.groups * (channels // num_groups) * itemsize % 16 == 0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # (batch, positions, channels, groups, itemsize): one pass, groups, lanes, rows, chunks
        ((256, 1024, 128, 32, 2), (True, 4, 16, 1024, 1)),
        ((256, 1024, 128, 32, 4), (True, 2, 8, 1024, 1)),
        ((256, 256, 256, 32, 2), (True, 8, 64, 256, 1)),
        ((256, 64, 256, 32, 2), (True, 8, 64, 64, 1)),
        ((16, 64, 1280, 32, 2), (True, 3, 128, 64, 1)),
        # one sample: narrower programs, and more of them
        ((1, 1024, 128, 32, 2), (True, 2, 8, 1024, 1)),
        ((1, 64, 1280, 32, 2), (True, 1, 64, 64, 1)),
        ((256, 4096, 128, 32, 4), (True, 1, 4, 4096, 1)),
        # no tile holds a group, or only in rows of 8 bytes
        ((2, 4096, 320, 32, 2), (False, 12, 128, 32, 32)),
        ((256, 4096, 128, 32, 2), (False, 32, 128, 32, 9)),
        ((256, 4096, 320, 32, 2), (False, 12, 128, 32, 3)),
        ((1, 65536, 64, 32, 2), (False, 32, 64, 64, 32)),
    ],
    ids=str,
)
def test_forms_of_usual_shapes(shape, expected):
    plan = choose(*shape)
    assert (plan.one_pass, plan.groups, plan.lanes, plan.rows, plan.chunks) == expected


def test_one_pass_reads_rows_of_16_bytes():
    for batch, positions, (channels, num_groups), itemsize, tensors in EVERY:
        plan = choose(batch, positions, channels, num_groups, itemsize, tensors)
        if plan.one_pass and plan.blocks > 1:
            assert plan.groups * (channels // num_groups) * itemsize >= 16


def test_more_multiprocessors_get_more_programs():
    programs = [plan.chunks * plan.blocks for plan in (choose_plan(1, 4096, 320, 32, 2, n) for n in (1, 2, 132))]
    assert programs == sorted(programs)
    assert programs[0] < programs[-1]


def test_backward_holds_two_tensors():
    forward, backward = choose(256, 256, 256, 32, 2), choose(256, 256, 256, 32, 2, tensors=2)
    assert backward.rows * backward.lanes == forward.rows * forward.lanes / 2
    assert backward.num_warps == forward.num_warps
    assert forward.crowded
    assert not backward.crowded
