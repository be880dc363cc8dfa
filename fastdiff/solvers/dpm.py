"""DPM-Solver and DPM-Solver++, multistep, on the probability-flow ODE and on the reverse SDE."""

import math

from fastdiff.solvers.exponential import adams, check_order, falling_orders
from fastdiff.solvers.grid import Grid
from fastdiff.solvers.registry import SolverFunction, register
from fastdiff.table import Row

# what the paper's names mean for the slope of a step of order 2 (`Interval.weights`)
SOLVER_TYPES = {"midpoint": "half_constant", "heun": "exact"}
# With fewer steps than this the last ones fall in order, as in the authors' code.
FEW_STEPS = 15


def slope_of(solver_type: str) -> str:
    """The slope rule of "midpoint" or "heun"; ValueError for anything else."""
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type is {solver_type!r}, accepted are {', '.join(SOLVER_TYPES)}")
    return SOLVER_TYPES[solver_type]


def check_eta(eta: float) -> None:
    """ValueError unless eta is finite and not negative."""
    if not (eta >= 0 and math.isfinite(eta)):
        raise ValueError(f"eta is {eta}, a finite number of at least 0 is needed")


def _multistep(
    grid: Grid,
    form: str,
    order: int,
    solver_type: str,
    lower_order_final: bool | None,
    euler_at_final: bool,
    third_order: str,
    eta: float = 0.0,
) -> list[Row]:
    check_order(order, 3)
    check_eta(eta)
    falls = len(grid) < FEW_STEPS if lower_order_final is None else lower_order_final
    return adams(
        grid,
        form=form,
        predictor=falling_orders(len(grid), order, lower_order_final=falls, euler_at_final=euler_at_final),
        tau=math.sqrt(eta),
        slope=slope_of(solver_type),
        third_order=third_order,
    )


def _ode(form: str) -> SolverFunction:
    def solver(
        grid: Grid,
        *,
        order: int = 2,
        solver_type: str = "midpoint",
        lower_order_final: bool | None = None,
        euler_at_final: bool = False,
        third_order: str = "exact",
    ) -> list[Row]:
        """DPM-Solver++ (Lu et al. 2022b, algorithm 2) or DPM-Solver (Lu et al. 2022a) from remembered values.

        The first row has no history and is of order 1, as is a last one that ends at sigma = 0.

        Args:
            order: 1 to 3.
            solver_type: of order 2, "midpoint" (the paper's 2M) or "heun" (the exact integral of a linear v).
            lower_order_final: the last rows fall in order; None: in walks of fewer than 15 rows.
            euler_at_final: the last row is of order 1 in any case.
            third_order: see `exponential.adams`; anything but "exact" is there for comparison with other packages.
        """
        return _multistep(grid, form, order, solver_type, lower_order_final, euler_at_final, third_order)

    return solver


def _sde(form: str) -> SolverFunction:
    def solver(
        grid: Grid,
        *,
        order: int = 2,
        solver_type: str = "midpoint",
        eta: float = 1.0,
        lower_order_final: bool | None = None,
        euler_at_final: bool = False,
        third_order: str = "exact",
    ) -> list[Row]:
        """SDE-DPM-Solver++ (Lu et al. 2022b) or SDE-DPM-Solver; options as of `dpmpp`, and:

        Args:
            eta: at least 0, tau² of `exponential`: 1 is the reverse SDE, 0 the ODE.
        """
        return _multistep(grid, form, order, solver_type, lower_order_final, euler_at_final, third_order, eta)

    return solver


dpmpp = register("dpmpp", extra_point=True)(_ode("data"))
dpm = register("dpm", extra_point=True)(_ode("noise"))
dpmpp_sde = register("dpmpp_sde", extra_point=True)(_sde("data"))
dpm_sde = register("dpm_sde", extra_point=True)(_sde("noise"))


@register("dpmpp_2m", extra_point=True)
def dpmpp_2m(grid: Grid, *, solver_type: str = "midpoint") -> list[Row]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): `dpmpp` of order 2."""
    return dpmpp(grid, order=2, solver_type=solver_type)


@register("dpmpp_3m", extra_point=True)
def dpmpp_3m(grid: Grid) -> list[Row]:
    """`dpmpp` of order 3."""
    return dpmpp(grid, order=3)


@register("dpmpp_2m_sde", extra_point=True)
def dpmpp_2m_sde(grid: Grid, *, solver_type: str = "midpoint", eta: float = 1.0) -> list[Row]:
    """`dpmpp_sde` of order 2, as k-diffusion's function of this name."""
    return dpmpp_sde(grid, order=2, solver_type=solver_type, eta=eta)


@register("dpmpp_3m_sde", extra_point=True)
def dpmpp_3m_sde(grid: Grid, *, eta: float = 1.0) -> list[Row]:
    """`dpmpp_sde` of order 3, with the exact integral of the parabola (k-diffusion's function takes half of it)."""
    return dpmpp_sde(grid, order=3, eta=eta)
