"""Walks in float32 against diffusers' schedulers as they are, whose tables are in float32 too.

The same walks agree to 1e-9 in float64 (test_solver_cases.py). The engine differs from diffusers on purpose where
diffusers takes t - N // n for the next timestep (DDIM, DDPM), draws noise in a last DDPM step that ends at x0, ends a
TCD walk above it, or reads the output of a model at another timestep than it was told: the cases leave those walks out.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from benchmarks.solver_cases import Walk, engine_walk, normals
from benchmarks.solver_table import CASES

ONE_STEP = ("ddpm", "ddim", "euler", "euler_a", "lcm", "tcd")
WALKS = [
    pytest.param(case, walk, id=f"{case.name}-{walk}")
    for case in CASES
    if case.solver in ONE_STEP
    for walk in case.walks[::2]
    if type(walk) is Walk
]


def relative(error, reference):
    return (error.double().abs().max() / reference.double().abs().max()).item()


@pytest.mark.parametrize(("case", "walk"), WALKS)
def test_float32_walk_is_as_near_as_diffusers_own_rounding(case, walk):
    table = walk.table(case.solver, case.options)
    start = normals()[0] * table.init_noise_sigma
    exact = walk.theirs_from(start, case.diffusers)
    theirs = walk.theirs_from(start.float(), case.diffusers)
    ours = engine_walk(table, start.float())
    assert ours.dtype == theirs.dtype == torch.float32
    # Two float32 walks differ by no more than their distances from the exact one. The engine's tables are exact, so its
    # distance is rounding: each product of a row (x, x0 and the two inside x0) is off by a few (4) units of 2^-24.
    c = table.columns
    inner = np.abs(c["px"]) + np.abs(c["pm"])
    products = (np.abs(c["cx"]) + np.abs(c["c0"]) * inner + np.abs(c["cm"]) + c["cz"]).max()
    largest = max(1.0, table.init_noise_sigma, exact.abs().max().item())
    bound = relative(theirs - exact, exact) + 4 * walk.steps * 2**-24 * products * largest / exact.abs().max().item()
    assert relative(ours - theirs, exact) <= bound


def test_there_are_walks_of_every_one_step_solver():
    assert {case.solver for case, walk in (one.values for one in WALKS)} == set(ONE_STEP)
