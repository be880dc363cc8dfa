"""Cases of the solvers of k-diffusion's family, on noise levels sigma / alpha or on straight paths."""

from __future__ import annotations

from benchmarks.solver_cases import SolverCase
from benchmarks.solver_cases_ancestral import walks

EULER_WALKS = (
    ("linear", "epsilon", "linspace", 10),
    ("scaled_linear", "v_prediction", "trailing", 7),
    ("cosine", "sample", "leading", 20),
    ("scaled_linear", "epsilon", "karras", 8),
    ("scaled_linear", "epsilon", "exponential", 8),
    ("scaled_linear", "v_prediction", "beta", 8),
)

CASES = (
    SolverCase(
        name="euler",
        solver="euler",
        diffusers="EulerDiscreteScheduler",
        k_diffusion="sample_euler",
        walks=walks(*EULER_WALKS),
        order=1,
    ),
    SolverCase(
        name="euler_a",
        solver="euler_a",
        diffusers="EulerAncestralDiscreteScheduler",
        k_diffusion="sample_euler_ancestral",
        # its class takes no data predictions and no sigma spacings
        walks=walks(*EULER_WALKS[:2], ("cosine", "epsilon", "leading", 20)),
        order=1,
        order_steps=120,
        stochastic=True,
    ),
)
