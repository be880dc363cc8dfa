"""The census counts what Inductor generates for a GPU: launches, bytes and copies, known here for small functions."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("triton")

from benchmarks.absent_gpu import DEVICE
from benchmarks.inductor_census import IN_SAMPLER, VARIANTS, census, census_of_unet, details, table
from fastdiff.unet import PRESETS, GroupNormSiLU, UNet
from fastdiff.unet_config import UNetConfig

TINY = UNetConfig(
    sample_size=8,
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    norm_num_groups=8,
    num_heads=1,
)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device=DEVICE)


def test_one_pass_over_one_tensor_is_one_kernel() -> None:
    found = census(lambda x: (x * 2 + 1).sigmoid(), lambda: (empty(1000, 64),))
    assert found["launches"] == {**dict.fromkeys(found["launches"], 0), "generated": 1}
    # read once and written once, in float32
    assert found["bytes"]["generated"] == 2 * 64_000 * 4
    assert found["copies"] == {"kernels": 0, "within_others": 0, "bytes_written": 0}
    assert (found["graphs"], found["graph_breaks"]) == (1, 0)


def test_a_change_of_layout_is_a_copy() -> None:
    found = census(lambda x: x.t().contiguous(), lambda: (empty(300, 64),))
    assert found["launches"]["generated"] == 1
    assert found["copies"] == {"kernels": 1, "within_others": 0, "bytes_written": 300 * 64 * 4}


def test_a_product_is_no_generated_kernel() -> None:
    found = census(lambda x, y: torch.relu(x @ y), lambda: (empty(64, 32), empty(32, 48)))
    assert found["launches"]["matmul"] == found["launches"]["generated"] == 1
    assert found["bytes"]["matmul"] == (64 * 32 + 32 * 48 + 64 * 48) * 4


def test_graph_breaks_are_counted_and_both_sides_of_them() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    found = census(broken, lambda: (empty(64),))
    assert (found["graphs"], found["graph_breaks"]) == (2, 1)
    assert found["launches"]["generated"] == 2


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        return {variant: census_of_unet(variant, "tiny-b2") for variant in VARIANTS}


def test_every_layer_of_the_unet_is_found(rows: dict[str, dict[str, Any]]) -> None:
    model = UNet(TINY)
    norms = sum(isinstance(module, GroupNormSiLU) for module in model.modules())
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    attentions = sum(module.__class__.__name__ == "SelfAttention" for module in model.modules())
    for variant, row in rows.items():
        assert row["graph_breaks"] == 0
        assert row["launches"]["convolution"] == convolutions
        assert row["launches"]["attention"] == attentions
        ours = variant in (IN_SAMPLER, "fastdiff", "diffusers, fused norms")
        assert row["launches"]["fastdiff"] == (norms if ours else 0)
        assert row["launches"]["other"] == 0
        # channels-last from end to end: at most the time embedding is copied
        activation = 2 * 32 * 8 * 8 * 2
        assert all(kernel["bytes"] < activation for kernel in row["kernels"] if kernel["only_copies"])


def test_fused_norms_take_kernels_and_traffic_away(rows: dict[str, dict[str, Any]]) -> None:
    pairs = (("fastdiff", "fastdiff, norms by Inductor"), ("diffusers, fused norms", "diffusers"))
    # a projection and a sum for each residual block, and the time embedding
    assert sum(rows[IN_SAMPLER]["launches"].values()) < sum(rows["fastdiff"]["launches"].values())
    for fused, plain in pairs:
        assert sum(rows[fused]["launches"].values()) < sum(rows[plain]["launches"].values())
        moved = [rows[name]["bytes"]["generated"] + rows[name]["bytes"]["fastdiff"] for name in (fused, plain)]
        assert moved[0] < moved[1]


def test_the_page_has_every_row(rows: dict[str, dict[str, Any]]) -> None:
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(VARIANTS)
    assert len({line.count("|") for line in lines}) == 1
    assert details(rows).count("## ") == len(VARIANTS)
