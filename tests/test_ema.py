import pytest
import torch
from torch import nn

from fastdiff.ema import EMA, descend_, lerp_


def model(seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7)).to(memory_format=torch.channels_last)
    return network.requires_grad_()


@pytest.mark.parametrize("weight", [1 - 0.1, 1 - 0.45, 0.5, 1 - 0.55, 1 - 0.9999])
def test_the_average_moves_by_a_weight_on_the_device(weight):
    """Bit for bit what lerp with a Python number does, which warms up and is as accurate as PyTorch's own average."""
    current = model(1)
    ema = EMA(model(0), 0.9999)
    expected = [value.lerp(target, weight) for value, target in zip(ema.model.parameters(), current.parameters())]
    addresses = [value.data_ptr() for value in ema.model.parameters()]
    current[1].running_mean.fill_(3)
    ema.update(current, torch.tensor(weight))
    assert all(torch.equal(value, wanted) for value, wanted in zip(ema.model.parameters(), expected))
    assert addresses == [value.data_ptr() for value in ema.model.parameters()]
    assert torch.equal(ema.model[1].running_mean, torch.full((7,), 3.0))
    assert not any(value.requires_grad for value in ema.model.parameters())


@pytest.mark.parametrize("weight", [0.9, 0.3, 1e-4])
def test_both_ways_to_move_agree(weight):
    generator = torch.Generator().manual_seed(0)
    averages, current = (
        [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (1, 2, 3, 3))] for _ in range(2)
    )
    ours, theirs = ([value.clone() for value in averages] for _ in range(2))
    lerp_(ours, current, torch.tensor(weight))
    descend_(theirs, current, torch.tensor(weight))
    for one, other in zip(ours, theirs):
        # A difference, a product and a sum of values below 4, each rounded to 24 bits: 3 * 4 * 2^-24.
        torch.testing.assert_close(one, other, rtol=0, atol=12 * 2**-24)
    assert all(not torch.equal(one, before) for one, before in zip(ours, averages))


def test_the_decay_warms_up():
    ema = EMA(nn.Linear(1, 1), 0.995)
    assert [1 - ema.weight(updates) for updates in (0, 10, 10_000)] == pytest.approx([0.1, 0.55, 0.995])


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        EMA(nn.Linear(1, 1), decay)
