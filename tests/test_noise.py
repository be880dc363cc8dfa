"""The noise contract: which arguments a value depends on, and that the values are independent standard normals."""

import math
import shutil

import pytest
import torch

from fastdiff.kernels import dispatch
from fastdiff.kernels.philox import STREAMS
from fastdiff.noise import normal

SHAPE = (5, 3, 6, 7)
GOLDEN = [[1063738052, 1066842584, -1107342331], [-1115682797, -1086443600, 1063170200]]
KEYS = {"seed": 11, "stream": "step", "draw": 3}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


def test_values_are_fixed_for_ever():
    """Images drawn with a seed must not change with a new version: these bits are part of the contract."""
    z = normal((2, 3), seed=1234567890123, sample_indices=torch.tensor([0, 4000000000]), stream="train", draw=77)
    assert bits(z).tolist() == GOLDEN
    numbers = {
        "initial": 0,
        "step": 1,
        "train": 2,
        "timestep": 3,
        "augment": 4,
        "label_dropout": 5,
        "order": 6,
        "dropout": 7,
    }
    assert numbers == STREAMS


@pytest.mark.parametrize("split", [1, 2, 4])
def test_batch_splits_do_not_matter(split):
    whole = normal(SHAPE, **KEYS)
    indices = torch.arange(SHAPE[0])
    parts = [normal((len(part), *SHAPE[1:]), sample_indices=part, **KEYS) for part in indices.split(split)]
    assert torch.equal(bits(torch.cat(parts)), bits(whole))


def test_order_of_the_samples_does_not_matter():
    order = torch.tensor([3, 0, 4, 4, 1])
    assert torch.equal(bits(normal(SHAPE, sample_indices=order, **KEYS)), bits(normal(SHAPE, **KEYS)[order]))


def test_seed_and_draw_may_differ_by_sample():
    seeds, draws = torch.tensor([11, 2**62, 0, 11, 5]), torch.tensor([3, 0, 2**32 - 1, 4, 3])
    mixed = normal(SHAPE, seed=seeds, draw=draws)
    for b in range(SHAPE[0]):
        one = normal((1, *SHAPE[1:]), seed=int(seeds[b]), draw=int(draws[b]), sample_indices=torch.tensor([b]))
        assert torch.equal(bits(mixed[b]), bits(one[0]))


@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 4), (2, 3, 2, 3, 4), (2, 5), (4,)], ids=str)
def test_memory_format_does_not_matter(shape):
    last, first = (normal(shape, memory_format=f, **KEYS) for f in (torch.channels_last, torch.contiguous_format))
    assert torch.equal(bits(last), bits(first))
    assert first.is_contiguous()
    assert last.movedim(1, -1).is_contiguous() if len(shape) > 1 else last.is_contiguous()


def test_elements_count_in_channels_last_order():
    image, row = normal((2, 3, 4, 5), **KEYS), normal((2, 60), **KEYS)
    assert torch.equal(bits(image.permute(0, 2, 3, 1).reshape(2, 60)), bits(row))
    # a longer sample begins with the same values
    assert torch.equal(bits(normal((2, 61), **KEYS)[:, :60]), bits(row))


def test_default_dtype_does_not_matter():
    expected = normal(SHAPE, **KEYS)
    torch.set_default_dtype(torch.float64)
    try:
        z = normal(SHAPE, **KEYS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert z.dtype == torch.float32
    assert torch.equal(bits(z), bits(expected))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")),
    ],
)
def test_compiled_noise_is_bit_equal(backend):
    def noise(seed):
        return normal(SHAPE, seed=seed, draw=2)

    seed = torch.tensor([1, 2, 3, 2**62, 5])
    compiled = torch.compile(noise, backend=backend, fullgraph=True)
    assert torch.equal(bits(compiled(seed)), bits(noise(seed)))


# Statistics of 2 * 2 * 5 * 2^19 = 10.5 million values. Each of the 15 comparisons has a false-alarm probability below
# 1e-7 (normal tail beyond 5.4 standard errors 6.7e-8, Kolmogorov's 2 exp(-2 * 2.95^2) = 5.5e-8); with a fixed seed the
# outcome is fixed too.
TAIL = 5.4


@pytest.fixture(scope="module")
def z() -> torch.Tensor:
    """Normals [stream, draw, sample, element]."""
    with pytest.MonkeyPatch.context() as patch:
        # made once, before the fixture that switches the interpreter off for a test
        patch.setattr(dispatch, "INTERPRET", False)
        draws = [[normal((5, 2**19), seed=99, stream=s, draw=d) for d in (0, 1)] for s in ("step", "train")]
    return torch.stack([torch.stack(row) for row in draws])


def test_moments(z):
    n = z.numel()
    powers, power = [], torch.ones((), dtype=torch.float64)
    value = z.double().flatten()
    for _ in range(4):
        power = power * value
        powers.append(power.mean().item())
    # E z^k = 0, 1, 0, 3; Var z^k = E z^2k - (E z^k)^2 = 1, 2, 15, 96
    for k, (moment, expected, variance) in enumerate(zip(powers, (0, 1, 0, 3), (1, 2, 15, 96)), 1):
        assert abs(moment - expected) < TAIL * math.sqrt(variance / n), f"moment {k}"


def test_kolmogorov_smirnov(z):
    n = z.numel()
    cdf = torch.special.ndtr(z.flatten().sort().values.double())
    grid = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum((cdf - grid).max(), (grid + 1 / n - cdf).max()).item()
    assert distance * math.sqrt(n) < 2.95


def pairs(z: torch.Tensor, between: str) -> tuple[torch.Tensor, torch.Tensor]:
    if between.startswith("neighbours"):
        lag = int(between[-1])
        return z[..., :-lag], z[..., lag:]
    axis = ("streams", "draws", "samples").index(between)
    return z.narrow(axis, 0, z.shape[axis] - 1), z.narrow(axis, 1, z.shape[axis] - 1)


@pytest.mark.parametrize("between", ["neighbours 1", "neighbours 2", "neighbours 3", "streams", "draws", "samples"])
def test_no_correlation(z, between):
    x, y = pairs(z, between)
    n = x.numel()
    product = x.double() * y
    # x y has variance 1, (x^2 - 1)(y^2 - 1) variance 4. Overlapping pairs are uncorrelated, so the variances add up.
    assert abs(product.mean().item()) < TAIL / math.sqrt(n)
    squares = (x.double().square() - 1) * (y.double().square() - 1)
    assert abs(squares.mean().item()) < TAIL * math.sqrt(4 / n)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"stream": "steps"}, ValueError, "stream must be one of initial, step"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, ValueError, "seed must be in"),
        ({"seed": 1.5}, TypeError, "seed must be an int .* got float"),
        ({"draw": 2**32}, ValueError, r"draw must be in \[0, 2\^32\), got 4294967296"),
        (
            {"seed": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"seed must be .* shape \[5\].* got int64 of shape \[4\]",
        ),
        ({"draw": torch.zeros(5)}, ValueError, "draw must be .* int64 .* got float32"),
        ({"sample_indices": torch.zeros(5, 1, dtype=torch.int64)}, ValueError, "sample_indices must be"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format must be"),
        ({"shape": ()}, ValueError, r"shape must be \[B\]"),
        ({"shape": (2, -1)}, ValueError, "shape must be"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(changed, error, message):
    arguments = {"shape": SHAPE, "seed": 1, **changed}
    with pytest.raises(error, match=message):
        normal(arguments.pop("shape"), **arguments)
