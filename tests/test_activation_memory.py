import pytest
import torch
from torch import nn

from fastdiff.activation_memory import ActivationMemory


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU counts what its allocator holds")
def test_every_storage_counts_once_and_weights_do_not():
    model = nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 2))
    x = torch.zeros(7, 3)
    with ActivationMemory(model, x.device) as memory:
        y = model(x)
    # The first layer keeps its input [7, 3]; both sigmoid and last layer keep [7, 5] between them.
    assert memory.bytes == 4 * (7 * 3 + 7 * 5)
    y.sum().backward()
    with ActivationMemory(model, x.device) as memory, torch.no_grad():
        model(x)
    assert memory.bytes == 0
