"""p_sample_ (the kernel in Triton's interpreter, or on a GPU) and p_sample_ref against the formulas in float64."""

import math
import shutil

import pytest
import torch

from fastdiff.kernels import dispatch
from fastdiff.kernels.device_table import FLOAT_COLUMNS, HISTORY_OFFSET, INT_COLUMNS, DeviceTable
from fastdiff.kernels.p_sample import _p_sample_op, p_sample_, p_sample_ref
from fastdiff.kernels.philox import STREAMS
from fastdiff.noise import normal

# One row of every kind that the solvers make, in the columns' names; h lists the history coefficients.
ROWS = {
    "ddpm": {"px": 1.6, "pm": -1.2, "lim": 1.0, "cx": 0.4, "c0": 0.7, "cz": 0.3, "draw": 5},
    "ddim": {"px": 1.3, "pm": -0.8, "lim": 1.0, "c0": 0.8, "cm": 0.6},
    "unclipped": {"px": 0.9, "pm": -0.4, "cx": 0.7, "c0": 0.3, "c_next": 0.125},
    "consistency": {"px": 0.2, "pm": 0.9, "lim": 0.8, "c0": 1.0, "cz": 0.6, "draw": 0},
    "multistep": {"px": 1.1, "pm": -0.5, "cx": 0.8, "c0": 0.9, "u0": 1.0, "h": [-0.4, 0.0], "slot": 1},
    "corrector": {"px": 1.1, "pm": -0.5, "cx": 0.8, "cm": 0.2, "ux": 0.3, "um": -0.7, "h": [0.5, -0.25], "slot": 0},
    "start": {"cx": 0.9, "cz": 0.4, "draw": 0, "stream": STREAMS["initial"]},
    "saving": {"cx": 1.0, "ux": 1.0, "slot": 0},
    "replay": {"h": [0.6, 0.0], "cz": 0.1, "draw": 2},
    "learned": {"px": 1.2, "pm": -0.9, "lim": 1.0, "cx": 0.5, "c0": 0.5, "cz": 0.3, "lv": 0.7, "vg": 0.09, "draw": 3},
    "inpaint": {"px": 1.2, "pm": -0.9, "cx": 0.5, "c0": 0.5, "cz": 0.3, "k0": 0.8, "kz": 0.6, "mg": -0.5, "draw": 1},
}
HISTORY_SLOTS = 2
SHAPES = [(3, 5), (2, 3, 7), (2, 3, 5, 7), (2, 2, 3, 2, 5), (2, 4, 17, 19), (1, 1, 1, 1), (2, 64, 1, 3)]
FEATURES = ("uncond", "threshold", "rescale", "grad", "next", "next2", "x0", "mask", "seed", "noise")


def make_table(rows: list[dict], device: torch.device, n_slots: int = HISTORY_SLOTS) -> DeviceTable:
    defaults = {"c_next": 0.5, "lim": math.inf, "g": 2.5, "slot": -1, "draw": -1, "stream": STREAMS["step"]}
    rows = [{**defaults, **row} for row in rows]
    floats = [[row.get(name, 0.0) for name in FLOAT_COLUMNS] + row.get("h", [0.0] * n_slots)[:n_slots] for row in rows]
    integers = [[row[name] for name in INT_COLUMNS] for row in rows]
    return DeviceTable(
        torch.tensor(floats, dtype=torch.float32, device=device).view(len(rows), HISTORY_OFFSET + n_slots),
        torch.tensor(integers, dtype=torch.int32, device=device),
    )


def lay_out(value: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor of these values with memory laid out as named; `value` is [B, C, *spatial]."""
    last = (0, *range(2, value.ndim), 1)
    if layout == "contiguous":
        return value.contiguous()
    if layout == "channels_last":
        return value.permute(last).contiguous().movedim(-1, 1)
    if layout == "offset":  # one element past an aligned address, and batch strides with a gap
        storage = torch.full((value.shape[0], value[0].numel() + 3), math.nan, dtype=value.dtype, device=value.device)
        out = storage[:, 1 : value[0].numel() + 1]
        out = out.view(value.shape[0], *(value.shape[axis] for axis in last[1:])).movedim(-1, 1)
    elif layout == "strided":  # no axis has stride 1
        storage = torch.full((*value.shape, 2), math.nan, dtype=value.dtype, device=value.device)
        out = storage[..., 0]
    else:
        raise AssertionError(layout)
    return out.copy_(value)


def make_arguments(
    shape: tuple[int, ...],
    rows: list[dict],
    device: torch.device,
    *,
    layout: str = "channels_last",
    inputs: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    model_dtype: torch.dtype = torch.float32,
    features: tuple[str, ...] = (),
    n_slots: int = HISTORY_SLOTS,
) -> dict:
    """Random arguments of p_sample_, outputs filled with NaN; one row a sample, in the order of `rows`."""
    generator = torch.Generator().manual_seed(sum(shape) + len(features))

    def random(*size: int, to: torch.dtype = dtype, how: str = inputs) -> torch.Tensor:
        return lay_out(torch.randn(size, generator=generator).to(device, to), how)

    batch, channels, *spatial = shape
    scale = 0.5 + torch.rand(2, batch, generator=generator).to(device)
    doubled = 2 * channels if "learned" in features else channels
    x = random(*shape, how=layout)
    possible = {
        "model": lambda: {"model_output": random(batch, doubled, *spatial, to=model_dtype)},
        "uncond": lambda: {"model_output_uncond": random(batch, doubled, *spatial, to=model_dtype)},
        "noise": lambda: {"noise": random(*shape)},
        "seed": lambda: {"seed": 1234567890123},
        "threshold": lambda: {"threshold": scale[0]},
        "rescale": lambda: {"rescale": scale[1]},
        "grad": lambda: {"grad": random(*shape)},
        "mask": lambda: {
            "mask": torch.rand(1, 1, *spatial, generator=generator).round().to(device),
            "known": random(*shape),
        },
        "next": lambda: {
            "model_input_out": lay_out(torch.full(shape, math.nan, dtype=model_dtype, device=device), layout)
        },
        "next2": lambda: {
            "model_input_out": lay_out(torch.full((2 * batch, *shape[1:]), math.nan, device=device), layout)
        },
        "x0": lambda: {"x0_out": lay_out(torch.full(shape, math.nan, device=device), layout)},
    }
    arguments = {"x": x, "model_output": None, "table": make_table(rows, device, n_slots)}
    arguments["row"] = torch.arange(batch, dtype=torch.int32, device=device) % len(rows)
    if n_slots:
        slots = [random(*shape, to=torch.float32, how=layout) for _ in range(n_slots)]
        storage = torch.stack([slot.movedim(1, -1) for slot in slots]).movedim(-1, 2)
        arguments["history"] = storage if layout == "channels_last" else torch.stack(slots)
        if layout in ("offset", "strided"):
            arguments["history"] = lay_out(storage.flatten(0, 1), layout).unflatten(0, (n_slots, batch))
    for feature in features:
        if feature != "learned":
            arguments.update(possible[feature]())
    return arguments


def formula(arguments: dict, z: torch.Tensor | None = None, bound: bool = False) -> dict:
    """The formulas of fastdiff.table in float64; with bound, of absolute values: what rounding errors scale by."""
    sign = torch.abs if bound else (lambda value: value)
    values = {
        name: sign(value.double())
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    x, batch = values["x"], len(values["x"])
    spread = (batch, *[1] * (x.ndim - 1))
    floats = sign(arguments["table"].floats.double())[arguments["row"].long()]
    slot, draw, _ = (column.view(spread) for column in arguments["table"].integers[arguments["row"].long()].unbind(1))
    c = {name: column.view(spread) for name, column in zip(FLOAT_COLUMNS, floats.unbind(1))}
    minus = torch.add if bound else torch.sub
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    if "model_output" in values:
        m = values["model_output"][:, : x.shape[1]]
        if values["model_output"].shape[1] != x.shape[1]:
            v = values["model_output"][:, x.shape[1] :]
        if "model_output_uncond" in values:
            m_uncond = values["model_output_uncond"][:, : x.shape[1]]
            m = m_uncond + c["g"] * minus(m, m_uncond)
    grad = values.get("grad", torch.zeros_like(x))
    m = values.get("rescale", torch.ones(batch, device=x.device)).view(spread) * m + c["mg"] * grad
    m = torch.where((c["pm"] == 0) & (c["cm"] == 0) & (c["um"] == 0), 0.0, m)
    x0 = c["px"] * x + c["pm"] * m
    if "threshold" in values:
        limit = values["threshold"].view(spread)
        x0 = (x0 if bound else torch.clamp(x0, -limit, limit)) / limit
    elif not bound:
        x0 = torch.clamp(x0, -c["lim"], c["lim"])
    y = c["ux"] * x + c["u0"] * x0 + c["um"] * m
    z = torch.zeros_like(x) if z is None else torch.where(draw >= 0, sign(z.double()), 0.0)
    x_next = c["cx"] * x + c["c0"] * x0 + c["cm"] * m + c["cz"] * torch.exp(c["lv"] * v) * z
    for k, history in enumerate(values.get("history", ())):
        h = floats[:, HISTORY_OFFSET + k].view(spread)
        x_next = x_next + torch.where(h == 0, 0.0, h * history)
    x_next = x_next + c["vg"] * torch.exp(2 * c["lv"] * v) * grad
    if "mask" in values:
        kept = c["k0"] * values["known"] + c["kz"] * z
        mask = torch.where((c["k0"] != 0) | (c["kz"] != 0), values["mask"], torch.zeros_like(values["mask"]))
        x_next = mask * kept + minus(torch.ones_like(x), mask) * x_next
    results = {"x": x_next, "x0_out": x0, "model_input_out": c["c_next"] * x_next}
    if "model_input_out" in values and len(values["model_input_out"]) != batch:
        results["model_input_out"] = results["model_input_out"].repeat(2, *[1] * (x.ndim - 1))
    if "history" in values:
        results["history"] = torch.stack([torch.where(slot == k, y, old) for k, old in enumerate(values["history"])])
    return results


def noise_of(arguments: dict) -> torch.Tensor | None:
    """The noise these arguments ask for: what is given, or that of the noise contract, sample by sample."""
    if arguments.get("seed") is None:
        return arguments.get("noise")
    device = arguments["x"].device
    indices = arguments.get("sample_indices", torch.arange(len(arguments["x"]), device=device))
    z = torch.zeros_like(arguments["x"], dtype=torch.float32)
    for b, row in enumerate(arguments["row"].tolist()):
        _, draw, stream = arguments["table"].integers[row].tolist()
        if draw >= 0:
            name = next(name for name, number in STREAMS.items() if number == stream)
            options = {"sample_indices": indices[b : b + 1], "stream": name, "draw": draw}
            z[b] = normal((1, *z.shape[1:]), seed=arguments["seed"], **options)[0]
    return z


def run(arguments: dict, implementation: str) -> None:
    """p_sample_, or p_sample_ref with the arguments as p_sample_ hands them over."""
    if implementation == "kernel":
        p_sample_(**arguments)
        return
    x, arguments = arguments["x"], dict(arguments)
    if "seed" in arguments:
        arguments["seed"] = torch.full((len(x),), arguments["seed"], device=x.device)
        arguments.setdefault("sample_indices", torch.arange(len(x), device=x.device))
    p_sample_ref(**arguments)


def check(arguments: dict, implementation: str) -> None:
    """Run, and compare every output with the formula.

    A result takes at most 32 rounded operations in a row, each off by at most 2^-24 of the sum of the terms' absolute
    values; exp adds the error of its argument, below that bound for |lv * v| < 8. Storing rounds once more.
    """
    z = noise_of(arguments)
    expected, bound = formula(arguments, z), formula(arguments, z, bound=True)
    run(arguments, implementation)
    for name, value in expected.items():
        got = arguments.get(name)
        if got is None:
            continue
        unit = torch.finfo(got.dtype).eps / 2
        tolerance = 32 * 2**-24 * bound[name] + unit * value.abs() + torch.finfo(got.dtype).smallest_normal
        error = (got.double() - value).abs()
        assert got.isfinite().all(), f"{name} was not written everywhere"
        assert (error <= tolerance).all(), f"{name}: {(error / tolerance).max():.3g} times the tolerance"


@pytest.fixture(params=["kernel", "ref"])
def implementation(request) -> str:
    return request.param


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_row(kind, implementation, device):
    features = ("seed", "next", "x0") if kind in ("start", "saving", "replay") else ("model", "seed", "next", "x0")
    features += ("mask", "grad") if kind == "inpaint" else ()
    features += ("learned", "grad") if kind == "learned" else ()
    check(make_arguments((2, 3, 5, 7), [ROWS[kind]], device, features=features), implementation)


@pytest.mark.parametrize(
    "shape", [(3, 5), (2, 3, 7), (2, 3, 5, 7), (2, 2, 3, 2, 5), (2, 4, 17, 19), (1, 1, 1, 1), (2, 64, 1, 3)]
)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "offset", "strided"])
def test_shapes_and_layouts_with_every_feature(shape, layout, implementation, device):
    features = ("model", "uncond", "learned", "seed", "rescale", "grad", "mask", "next2", "x0")
    rows = [ROWS[kind] for kind in ("learned", "inpaint", "corrector")]
    check(make_arguments(shape, rows, device, layout=layout, features=features), implementation)


@pytest.mark.parametrize(
    ("layout", "inputs"),
    [
        ("channels_last", "contiguous"),
        ("channels_last", "strided"),
        ("contiguous", "channels_last"),
        ("contiguous", "offset"),
        ("strided", "contiguous"),
    ],
)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_inputs_of_other_layouts(layout, inputs, learned, implementation, device):
    features = ("model", "uncond", "noise", "grad", "mask", "next", "x0") + (("learned",) if learned else ())
    rows = [ROWS["inpaint"], ROWS["learned"]]
    check(make_arguments((2, 3, 5, 6), rows, device, layout=layout, inputs=inputs, features=features), implementation)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dtypes(dtype, model_dtype, implementation, device):
    features = ("model", "uncond", "noise", "next", "x0")
    arguments = make_arguments(
        (2, 3, 5, 7), [ROWS["ddpm"], ROWS["corrector"]], device, dtype=dtype, model_dtype=model_dtype, features=features
    )
    check(arguments, implementation)
    assert arguments["x"].dtype == dtype


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_alone(feature, implementation, device):
    row = ROWS["inpaint"] if feature == "mask" else ROWS["ddpm"]
    features = ("model", feature)
    check(make_arguments((2, 3, 5, 7), [row], device, n_slots=0, features=features), implementation)


@pytest.mark.parametrize("feature", ["threshold", "rescale"])
def test_scales_of_any_strides(feature, implementation, device):
    rows = [ROWS["ddim"], ROWS["multistep"]]
    arguments = make_arguments((2, 3, 5, 7), rows, device, features=("model", "x0", feature))
    padded = torch.full((2, 2), math.nan, device=device)
    padded[:, 0] = arguments[feature]
    arguments[feature] = padded[:, 0]
    check(arguments, implementation)


@pytest.mark.parametrize("column", ["mg", "vg"])
def test_classifier_gradient_in_score_and_mean_form(column, implementation, device):
    row = {**ROWS["ddpm"], column: -0.4, "lim": math.inf}
    arguments = make_arguments((2, 3, 5, 7), [row], device, n_slots=0, features=("model", "grad", "x0"))
    before = arguments["x"].clone()
    check(arguments, implementation)
    without = make_arguments((2, 3, 5, 7), [ROWS["ddpm"]], device, n_slots=0, features=("model", "grad", "x0"))
    without["x"].copy_(before)
    run(without, implementation)
    assert not torch.equal(arguments["x"], without["x"])


def test_rows_are_read_per_sample(implementation, device):
    rows = [ROWS[kind] for kind in ("ddpm", "multistep", "corrector", "start")]
    features = ("model", "seed", "next", "x0")
    together = make_arguments((4, 3, 5, 7), rows, device, features=features)
    together["row"] = torch.tensor([2, 0, 3, 1], dtype=torch.int32, device=device)
    alone = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in together.items()}
    check(together, implementation)
    for b in range(4):
        one = {name: alone[name][b : b + 1] for name in ("x", "model_output", "row", "model_input_out", "x0_out")}
        one["history"] = alone["history"][:, b : b + 1]
        one |= {"table": alone["table"], "seed": alone["seed"]}
        one["sample_indices"] = torch.tensor([b], device=device)
        run(one, implementation)
    for name in ("x", "history", "model_input_out", "x0_out"):
        assert torch.equal(together[name], alone[name]), name


@pytest.mark.parametrize("number", [-1, 3, 2**31 - 1, -(2**31)])
def test_a_row_out_of_range_poisons_its_sample_only(number, implementation, device):
    rows = [ROWS["multistep"], ROWS["ddim"], ROWS["start"]]
    arguments = make_arguments((3, 3, 5, 7), rows, device, features=("model", "seed", "threshold", "next", "x0"))
    arguments["row"] = torch.tensor([0, number, 2], dtype=torch.int32, device=device)
    history = arguments["history"].clone()
    run(arguments, implementation)
    for name in ("x", "x0_out", "model_input_out"):
        assert arguments[name][1].isnan().all(), name
        assert arguments[name][[0, 2]].isfinite().all(), name
    assert torch.equal(arguments["history"][:, 1], history[:, 1])


@pytest.mark.parametrize("where", ["x", "model_output", "model_output_uncond", "rescale", "threshold"])
def test_nan_stays_where_it_is(where, implementation, device):
    """One sample a kind of row, one NaN each: exactly what depends on it is NaN."""
    features = ("model", "uncond", "seed", "next", "x0")
    features += (where,) if where in ("rescale", "threshold") else ()
    shape = (len(ROWS), 3, 2, 3)
    arguments = make_arguments(shape, list(ROWS.values()), device, features=features)
    element = (slice(None),) if arguments[where].ndim == 1 else (slice(None), 2, 1, 1)
    arguments[where][element] = math.nan
    expected = torch.zeros(shape, dtype=torch.bool, device=device)
    expected[element] = True
    if where.startswith("model") or where == "rescale":
        for b, row in enumerate(ROWS.values()):
            expected[b] &= any(row.get(name) for name in ("pm", "cm", "um"))
    run(arguments, implementation)
    for name in ("x", "model_input_out"):
        assert torch.equal(arguments[name].isnan(), expected), name


def test_what_a_row_multiplies_by_zero_is_not_read(implementation, device):
    """Garbage in unread slots, in the model output of rows without a model, in noise, gradient, known and variance."""
    rows = [ROWS["start"], {"cx": 0.5, "h": [0.0, 0.5], "slot": 0, "ux": 1.0}]
    features = ("model", "uncond", "learned", "noise", "grad", "mask", "rescale", "next", "x0")
    arguments = make_arguments((2, 3, 5, 7), rows, device, features=features)
    for name in ("model_output", "model_output_uncond", "grad", "known", "rescale"):
        arguments[name].fill_(math.nan)
    arguments["noise"][1] = math.nan
    arguments["history"][0] = math.nan
    arguments["history"][1, 0] = math.nan
    run(arguments, implementation)
    for name in ("x", "model_input_out", "x0_out"):
        assert arguments[name].isfinite().all(), name
    assert arguments["history"][0, 1].isfinite().all()
    assert arguments["history"][:, 0].isnan().all()
    clean = make_arguments((2, 3, 5, 7), rows, device, features=features)
    run(clean, implementation)
    assert torch.equal(arguments["x"], clean["x"])


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "strided"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5, 7), (2, 2, 3, 2, 5)])
def test_noise_is_that_of_the_contract(shape, layout, implementation, device):
    """cx = 0 and cz = 1 leave the noise itself: bit-equal to fastdiff.noise.normal, whatever the layout."""
    rows = [{"cz": 1.0, "draw": 7}, {"cz": 1.0, "draw": 2, "stream": STREAMS["initial"]}, {"cz": 1.0, "draw": -1}]
    arguments = make_arguments(shape, rows, device, layout=layout, n_slots=0, features=("seed",))
    arguments["sample_indices"] = torch.arange(len(arguments["x"]), device=device) + 2**32 - 2
    z = noise_of(arguments)
    run(arguments, implementation)
    assert torch.equal(arguments["x"], z)
    given = make_arguments(shape, rows, device, layout=layout, n_slots=0)
    run({**given, "noise": z}, implementation)
    assert torch.equal(given["x"], z)


def test_seeds_are_read_per_sample(device):
    arguments = make_arguments((3, 3, 5, 7), [{"cz": 1.0, "draw": 4}], device, n_slots=0)
    seed = torch.tensor([3, 2**62 + 5, 3], device=device)
    sample_indices = torch.tensor([8, 8, 8], device=device)
    p_sample_(**arguments, seed=seed, sample_indices=sample_indices)
    assert torch.equal(arguments["x"][0], arguments["x"][2])
    assert torch.equal(arguments["x"], normal((3, 3, 5, 7), seed=seed, sample_indices=sample_indices, draw=4))


def test_writes_stay_inside_their_tensors(device):
    arguments = make_arguments(
        (2, 3, 5, 7), [ROWS["corrector"]], device, layout="offset", features=("model", "next", "x0")
    )
    storages = {
        name: torch.as_strided(value, (value.untyped_storage().nbytes() // 4,), (1,), 0)
        for name, value in arguments.items()
        if name in ("x", "history", "model_input_out", "x0_out")
    }
    padding = {name: storage.isnan().sum() for name, storage in storages.items()}
    inside = {name: arguments[name].isnan().sum() for name in storages}
    p_sample_(**arguments)
    for name, storage in storages.items():
        assert storage.isnan().sum() == padding[name] - inside[name], name


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 3, 0, 7)])
def test_empty_tensors(shape, device):
    arguments = make_arguments(shape, [ROWS["ddpm"]], device, features=("seed", "next", "x0"))
    p_sample_(**arguments)
    assert arguments["x"].shape == shape


def test_mask_and_known_broadcast(device):
    shape = (2, 3, 5, 7)
    full = make_arguments(shape, [ROWS["inpaint"]], device, features=("model", "noise", "mask"))
    small = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in full.items()}
    known = torch.randn(3, 1, 1, device=device)
    p_sample_(**{**small, "known": known})
    p_sample_(**{**full, "mask": full["mask"].expand(shape).contiguous(), "known": known.expand(shape).contiguous()})
    assert torch.equal(small["x"], full["x"])


def test_rows_that_do_not_blend_leave_the_mask_alone(device):
    """The start and the forward jumps of an in-painting walk: k0 = kz = 0, and the mask may hold anything."""
    plain = make_arguments((2, 3, 5, 7), [ROWS["ddpm"]], device, features=("model", "seed", "next"))
    masked = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in plain.items()}
    nothing = torch.full((1, 1, 5, 7), float("nan"), device=device)
    p_sample_(**plain)
    p_sample_(**{**masked, "mask": nothing, "known": nothing})
    assert torch.equal(plain["x"], masked["x"])


BAD_ARGUMENTS = {
    "x of another rank": (lambda a: {"x": a["x"][:, 0, 0, 0]}, ValueError, "x must"),
    "x of integers": (lambda a: {"x": a["x"].int()}, ValueError, "x must"),
    "x expanded": (lambda a: {"x": a["x"][:1].expand_as(a["x"])}, ValueError, "expanded"),
    "row int64": (lambda a: {"row": a["row"].long()}, ValueError, "row must"),
    "row of another batch": (lambda a: {"row": a["row"][:1]}, ValueError, "row must"),
    "row a number": (lambda a: {"row": 1}, TypeError, "row must"),
    "table without rows": (lambda a: {"table": DeviceTable(*(value[:0] for value in a["table"]))}, ValueError, "table"),
    "table float64": (lambda a: {"table": a["table"]._replace(floats=a["table"].floats.double())}, ValueError, "table"),
    "model_output of three times the channels": (
        lambda a: {"model_output": a["x"].repeat(1, 3, 1, 1)},
        ValueError,
        "model_output must",
    ),
    "uncond alone": (
        lambda a: {"model_output": None, "model_output_uncond": a["x"].clone()},
        ValueError,
        "model_output",
    ),
    "uncond of other strides": (
        lambda a: {"model_output_uncond": a["model_output"].contiguous()},
        ValueError,
        "strides of model_output",
    ),
    "history complex": (
        lambda a: {"history": a["history"].to(torch.complex64)},
        ValueError,
        "history must .* complex64",
    ),
    "mask of another size": (
        lambda a: {"mask": a["x"][..., :2], "known": a["x"].clone()},
        ValueError,
        "mask must be broadcastable to the shape",
    ),
    "history missing": (lambda a: {"history": None}, ValueError, "history must"),
    "history of too few slots": (lambda a: {"history": a["history"][:1]}, ValueError, "history must"),
    "history laid out otherwise": (lambda a: {"history": a["history"].contiguous()}, ValueError, "laid out as x"),
    "x0_out laid out otherwise": (lambda a: {"x0_out": a["x"].contiguous()}, ValueError, "laid out as x"),
    "model_input_out of three batches": (
        lambda a: {"model_input_out": a["x"].repeat(3, 1, 1, 1)},
        ValueError,
        "model_input_out must",
    ),
    "noise and seed": (lambda a: {"noise": a["x"].clone(), "seed": 1}, ValueError, "noise and seed"),
    "negative seed": (lambda a: {"seed": -1}, ValueError, "seed must"),
    "mask alone": (lambda a: {"mask": a["x"].clone()}, ValueError, "mask and known"),
    "threshold of another batch": (lambda a: {"threshold": a["x"][0, 0, 0, :3]}, ValueError, "threshold must"),
    "x requires grad": (lambda a: {"x": a["x"].requires_grad_()}, ValueError, "x requires grad"),
    "model_output requires grad": (
        lambda a: {"model_output": a["model_output"].requires_grad_()},
        ValueError,
        "model_output requires grad",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name, device):
    change, error, message = BAD_ARGUMENTS[name]
    arguments = make_arguments((2, 3, 5, 7), [ROWS["ddpm"]], device, features=("model",))
    with pytest.raises(error, match=message):
        p_sample_(**{**arguments, **change(arguments)})


def test_axes_that_do_not_merge_are_an_error_in_the_kernel(device):
    if not dispatch.use_triton(torch.empty(0, device=device)):
        pytest.skip("the plain reference takes any strides")
    arguments = make_arguments((2, 3, 4, 4, 4), [ROWS["ddpm"]], device, n_slots=0)
    crop = torch.randn(2, 3, 6, 6, 6, device=device)[:, :, 1:5, 1:5, 1:5]
    with pytest.raises(ValueError, match="do not merge"):
        p_sample_(**{**arguments, "model_output": crop})


def test_opcheck(device):
    if not dispatch.HAS_TRITON or not dispatch.use_triton(torch.empty(0, device=device)):
        pytest.skip("the custom op launches the Triton kernel")
    features = ("model", "uncond", "mask", "next", "x0")
    arguments = make_arguments((2, 3, 5, 7), [ROWS["corrector"]], device, features=features)
    names = ("model_output_uncond", "history", "noise", "seed", "sample_indices", "threshold", "rescale", "grad")
    names += ("mask", "known", "model_input_out", "x0_out")
    arguments["mask"] = arguments["mask"].expand_as(arguments["x"])
    head = (arguments["x"], arguments["model_output"], *arguments["table"], arguments["row"])
    torch.library.opcheck(_p_sample_op, (*head, *(arguments.get(name) for name in names)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks_or_recompiles(backend, device):
    if backend == "inductor" and device.type == "cpu" and shutil.which("g++") is None:
        pytest.skip("Inductor on the CPU needs g++")
    rows = [ROWS["ddpm"], ROWS["corrector"], ROWS["multistep"]]

    def step(arguments: dict) -> torch.Tensor:
        p_sample_(**arguments)
        return arguments["x"] * 2.0

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for number, stance in enumerate(["default", "fail_on_recompile", "fail_on_recompile"]):
        arguments = make_arguments((2, 3, 5, 7), rows, device, features=("model", "uncond", "next2", "x0"))
        arguments["row"] = torch.tensor([number, 2 - number], dtype=torch.int32, device=device)
        arguments["seed"] = torch.tensor([number, 77], device=device)
        eager = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        p_sample_(**eager)
        with torch.compiler.set_stance(stance):
            doubled = compiled(arguments)
        # Inductor may contract multiplies and adds: 32 roundings of 2^-24 of terms that add up to less than 64
        for name in ("x", "history", "model_input_out", "x0_out"):
            torch.testing.assert_close(arguments[name], eager[name], rtol=0, atol=64 * 32 * 2**-24)
        torch.testing.assert_close(doubled, arguments["x"] * 2.0, rtol=0, atol=0)
