"""A smooth network and unit noise for whole trajectories in float64."""

import math

import pytest
import torch

from fastdiff.kernels.philox import STREAMS
from fastdiff.table import StepTable, run_table


class Walk:
    """Runs tables on a fixed start, fixed step noise and a network whose slope is below 1, so that walks stay tame."""

    def __init__(self, seed: int = 0, n_draws: int = 64):
        generator = torch.Generator().manual_seed(seed)
        self.unit = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        self.normals = torch.randn(n_draws, 3, 5, generator=generator, dtype=torch.float64)

    @staticmethod
    def network(x: torch.Tensor, t: float) -> torch.Tensor:
        return 0.6 * torch.tanh(0.7 * x + math.sin(0.01 * t)) + 0.2 * x

    def noise_fn(self, i: int, like: torch.Tensor) -> torch.Tensor:
        return self.normals[i].to(like.dtype)

    def run(self, table: StepTable, network=None, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        def noise(stream: int, draw: int) -> torch.Tensor:
            assert stream == STREAMS["step"]
            return self.normals[draw].to(dtype)

        return run_table(table, network or self.network, (self.unit * table.init_noise_sigma).to(dtype), noise)


@pytest.fixture
def walk() -> Walk:
    return Walk()
