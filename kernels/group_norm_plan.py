"""How a group normalisation is laid out over programs: the one place that decides it, in plain Python.

A program owns whole groups of one sample, so that no sum crosses programs, and walks tiles [rows, channels] of its
channels-last memory. Either one program holds all positions of its groups in registers (one pass: one read, one
write), or the positions are split into chunks, of which a first kernel takes the sums and a second one writes the
result (two passes: two reads, one write).

The rule:
1. One pass where a tile holds the plane of a program's groups in rows of 16 bytes or more: 16,384 elements forward, and
   half as many backward, where a program holds x and dy. Idle multiprocessors are no reason to split a plane, as a
   second launch costs more than reading a tile with one of them: a small batch's groups are spread over more and
   narrower programs instead.
2. Of the numbers of groups that a program may own, the one with the fewest idle multiprocessors, then the fewest lanes
   (those of padding, and those of 32-byte sectors fetched twice, count), then a tile of at most 32 KB, then rows of up
   to 128 bytes, then the smallest tile.
3. Else two passes, with as many chunks as give every multiprocessor 16 programs, at most 32.

The batch takes part in it, so a sample's last bits may differ between batch sizes. They never depend on the other
samples, and are the same in every run.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastdiff.kernels.dispatch import INTERPRET, LAUNCH_OPTIONS

# Elements that the tiles of a program hold in registers without spilling.
MAX_TILE = 16384
# Up to this size, two programs or more share a multiprocessor and hide each other's waiting.
TILE_BYTES = 32768
# A tile of the two-pass kernels, small enough for several programs on a multiprocessor.
SPLIT_TILE = 4096
SPLIT_LANES = 128
MAX_CHUNKS = 32
PROGRAMS_PER_MULTIPROCESSOR = 16
# An H200, for launches that are planned without a device.
DEFAULT_MULTIPROCESSORS = 132
# Channels of a group beyond which no tile holds a row of them.
MAX_GROUP = SPLIT_TILE
# Bytes of one access of a thread, of the least that memory hands out, and of a cache line.
NARROWEST, SECTOR, LINE = 16, 32, 128


@dataclass(frozen=True)
class Plan:
    """Programs of one launch, each with `steps` tiles [rows, lanes] one after the other.

    Attributes:
        one_pass: a program sees all positions of its groups at once; else `chunks` programs share them.
        groups: groups that a program owns.
        lanes: their channels, padded to a power of two.
        blocks: programs side by side that cover all groups.
        chunks: programs that share the positions of a sample.
        crowded: threads hold 64 elements, for which the compiler may take a few registers more than 128.
    """

    one_pass: bool
    groups: int
    lanes: int
    blocks: int
    rows: int
    steps: int
    chunks: int
    num_warps: int
    crowded: bool = False

    def options(self, channels: int, num_groups: int) -> dict[str, Any]:
        """What the kernels are compiled for."""
        # 8 warps of 128 registers leave room for a second program on a multiprocessor
        limit = {"maxnreg": 128} if self.crowded and not (INTERPRET or torch.version.hip) else {}
        return {
            **LAUNCH_OPTIONS,
            **limit,
            "CHANNELS": channels,
            "GROUP": channels // num_groups,
            "GROUPS": self.groups,
            "GROUPS_PADDED": _power_of_two(self.groups),
            "BLOCKS": self.blocks,
            "ROWS": self.rows,
            "LANES": self.lanes,
            "num_warps": self.num_warps,
        }


@functools.cache
def choose_plan(
    batch: int,
    positions: int,
    channels: int,
    num_groups: int,
    itemsize: int,
    multiprocessors: int = DEFAULT_MULTIPROCESSORS,
    tensors: int = 1,
) -> Plan:
    """The plan for [batch, channels, positions] of `itemsize` bytes an element; see the rule above.

    tensors: how many of this shape a program holds: 1 forward, 2 backward.
    """
    widths = _widths(channels, num_groups, itemsize)
    rows = _power_of_two(positions)

    def cost(width: _Width) -> tuple[int, float, bool, float, int]:
        idle = max(0, multiprocessors - batch * width.blocks)
        alone = rows * width.lanes * itemsize * tensors > TILE_BYTES
        return idle, width.fetched_lanes, alone, -min(width.row_bytes, LINE), width.lanes

    fitting = [width for width in widths if rows * width.lanes * tensors <= MAX_TILE and width.row_bytes >= NARROWEST]
    if fitting:
        best = min(fitting, key=cost)
        tile = rows * best.lanes
        num_warps = _num_warps(tile, itemsize)
        crowded = tensors == 1 and tile == 64 * 32 * num_warps
        return Plan(True, best.groups, best.lanes, best.blocks, rows, 1, 1, num_warps, crowded)

    narrow = [width for width in widths if width.lanes <= SPLIT_LANES] or widths[:1]
    best = min(narrow, key=lambda width: (width.fetched_lanes, -width.lanes))
    rows = SPLIT_TILE // best.lanes
    tiles = -(-positions // rows)
    chunks = min(MAX_CHUNKS, tiles, -(-PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // (batch * best.blocks)))
    steps = -(-tiles // chunks)
    chunks = -(-tiles // steps)
    return Plan(False, best.groups, best.lanes, best.blocks, rows, steps, chunks, 4 * tensors)


@functools.cache
def multiprocessors_of(device: torch.device) -> int:
    """How many the device has; those of an H200 where there is none."""
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Width(NamedTuple):
    """A number of groups that a program may own; row_bytes: what lies together in memory, no end of it for all."""

    groups: int
    lanes: int
    blocks: int
    row_bytes: float

    @property
    def fetched_lanes(self) -> float:
        """Lanes of all blocks, as many times as each sector of memory is fetched."""
        return self.blocks * self.lanes * max(1.0, SECTOR / self.row_bytes)


def _widths(channels: int, num_groups: int, itemsize: int) -> list[_Width]:
    """All in ascending order; where rows of all channels start on 16 bytes, for wide accesses, those that do, too."""
    group = channels // num_groups
    widths = [
        _Width(groups, _power_of_two(groups * group), -(-num_groups // groups), groups * group * itemsize)
        for groups in range(1, num_groups)
        if channels * itemsize % 16 or groups * group * itemsize % 16 == 0
    ]
    return [*widths, _Width(num_groups, _power_of_two(channels), 1, math.inf)]


def _num_warps(tile: int, itemsize: int) -> int:
    """32 elements a thread, 64 of two bytes in the largest tiles."""
    return max(1, min(4 * itemsize, tile // 1024))


def _power_of_two(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << max(0, n - 1).bit_length()
