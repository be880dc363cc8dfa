"""What the kernels compute, once more: in float64 NumPy, from papers and docstrings, sharing no code with the kernels.

Every value carries a bound of how far a float32 evaluation of its formula may be from it (running error analysis,
Higham, "Accuracy and Stability of Numerical Algorithms", section 3.3). With u = 2^-24, a rounded product of a + da and
b + db is off by at most |a| db + |b| da + da db and one rounding, u times its size. A sum of n terms, in any order, is
off by the sum of their errors and n - 1 roundings of at most the sum of their sizes. Fused multiply-adds only leave
roundings out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
U = 2.0**-24
SUBNORMAL = 2.0**-150
MASK = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Rounded:
    """A float64 value, and the bound of the error of its float32 evaluation."""

    value: Array
    error: Array

    @classmethod
    def exact(cls, value: Any) -> Rounded:
        """A value that float32 holds, such as a kernel's input."""
        value = np.asarray(value, dtype=np.float64)
        return cls(value, np.zeros_like(value))

    @classmethod
    def constant(cls, value: Any) -> Rounded:
        """A number that is rounded to float32 first."""
        value = np.asarray(value, dtype=np.float64)
        return cls(value, U * np.abs(value))

    @property
    def size(self) -> Array:
        """Bound of the absolute value."""
        return np.abs(self.value) + self.error

    def __mul__(self, other: Rounded) -> Rounded:
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return Rounded(self.value * other.value, error + U * self.size * other.size + SUBNORMAL)

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error)

    def __truediv__(self, divisor: Rounded) -> Rounded:
        """By an exact divisor, to 2 units in the last place (4 u), as the GPU's fast division gives."""
        value, error = self.value / divisor.value, self.error / np.abs(divisor.value)
        return Rounded(value, error + 4 * U * (np.abs(value) + error))

    def clamp(self, limit: Rounded) -> Rounded:
        """To [-limit, limit] with an exact limit: errors do not grow."""
        return Rounded(np.clip(self.value, -limit.value, limit.value), self.error)

    def exp(self) -> Rounded:
        """Computed as 2^(x log2 e): the product is rounded, |x| u in the result, then 2 units in the last place."""
        value = np.exp(self.value)
        return Rounded(value, value * (np.expm1(self.error) + (4 + 2 * self.size) * U))

    def where(self, condition: NDArray[np.bool_], other: Rounded) -> Rounded:
        """Itself where condition holds, else other."""
        return Rounded(
            np.where(condition, self.value, other.value),
            np.where(condition, self.error, other.error),
        )


def total(*terms: Rounded) -> Rounded:
    """The sum of terms, added in any order."""
    value, error, size = (
        sum(getattr(term, name) for term in terms[1:]) + getattr(terms[0], name) for name in ("value", "error", "size")
    )
    return Rounded(value, error + (len(terms) - 1) * U * size)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 of Python ints or uint64 arrays that hold 32-bit words (Salmon et al. 2011, section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = (c0 * 0xD2511F53) >> 32, (c0 * 0xD2511F53) & MASK
        high1, low1 = (c2 * 0xCD9E8D57) >> 32, (c2 * 0xCD9E8D57) & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def normals(
    seeds: NDArray[np.int64],
    sample_indices: NDArray[np.int64],
    draws: NDArray[np.int64],
    streams: NDArray[np.int64],
    shape: tuple[int, ...],
) -> Rounded:
    """Normals of the noise contract for [B, C, H, W], two of each two words."""
    w0, w1, w2, w3 = element_words(seeds, sample_indices, draws, streams, shape)
    pairs = [*box_muller(w0, w1), *box_muller(w2, w3)]
    return Rounded(arranged([pair.value for pair in pairs], shape), arranged([pair.error for pair in pairs], shape))


def element_words(
    seeds: NDArray[np.int64],
    sample_indices: NDArray[np.int64],
    draws: NDArray[np.int64],
    streams: NDArray[np.int64],
    shape: tuple[int, ...],
) -> tuple[Any, Any, Any, Any]:
    """The noise contract for [B, C, H, W]: element e = p * C + c (p over H, W) is word e % 4 of counter e // 4."""
    batch, channels, positions = shape[0], shape[1], int(np.prod(shape[2:]))
    groups = -(-channels * positions // 4)
    per_sample = [np.asarray(value).astype(np.uint64)[:, None] for value in (draws, sample_indices, streams, seeds)]
    draw, index, stream, seed = (np.broadcast_to(value, (batch, groups)) for value in per_sample)
    group = np.broadcast_to(np.arange(groups, dtype=np.uint64), (batch, groups))
    return philox((group, draw, index, stream), (seed & np.uint64(MASK), seed >> np.uint64(32)))


def arranged(values: Sequence[NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    """The four arrays that stand for the elements 4 g to 4 g + 3, as [B, C, H, W]."""
    flat = np.stack(values, -1).reshape(shape[0], -1)[:, : int(np.prod(shape[1:]))]
    return np.moveaxis(flat.reshape(shape[0], *shape[2:], shape[1]), -1, 1)


def dropout(x: Rounded, words: NDArray[np.uint64], p: float) -> Rounded:
    """x / (1 - p) where the element's word is at least p * 2^32 to the nearest, 0 elsewhere."""
    nothing = Rounded.exact(np.zeros_like(x.value))
    return (x * Rounded.constant(1 / (1 - p))).where(words >= np.uint64(round(p * 2**32)), nothing)


def box_muller(w0: Any, w1: Any) -> tuple[Rounded, Rounded]:
    """Two normals of two 32-bit words: radius sqrt(-2 ln u) with u = (w0 + 1/2) / 2^32, and an angle of w1.

    The angle is (w1 mod 2^23) / 2^23 - 1/2 quarter turns; bit 31 negates its cosine, bit 30 swaps cosine and sine.

    What float32 does to it: u is rounded twice, 2 u in its logarithm. The logarithm's polynomial has a relative error
    of 1.12e-6, and its evaluation at most 6 roundings of terms whose sizes sum to |e| ln 2 + 2 |f| for u = 2^e (1 + f).
    The square root turns an error d of its radicand into min(d / radius, sqrt(d)), and is itself good to 3.3e-7 and 8
    roundings. The angle is exact, its polynomials are good to 5e-8 and 5 roundings of values below 1.
    """
    uniform = (w0.astype(np.float64) + 0.5) / 2**32
    log = np.log(uniform)
    exponent = np.round(np.log2(uniform))
    fraction = np.abs(uniform / 2**exponent - 1)
    log_error = 2 * U + 1.12e-6 * np.abs(log) + 6 * U * (np.abs(exponent) * np.log(2) + 2 * fraction)
    radius = np.sqrt(-2 * log)
    radius_error = np.minimum(2 * log_error / radius, np.sqrt(2 * log_error)) + (3.3e-7 + 8 * U) * radius
    angle = ((w1 & np.uint64(0x007FFFFF)).astype(np.float64) / 2**23 - 0.5) * (np.pi / 2)
    cosine = np.where(w1 & np.uint64(0x80000000), -1.0, 1.0) * np.cos(angle)
    swap = (w1 & np.uint64(0x40000000)) != 0
    sine, polar = np.sin(angle), Rounded(radius, radius_error)
    trigonometric_error = np.full_like(radius, 5e-8 + 5 * U)
    return (
        polar * Rounded(np.where(swap, sine, cosine), trigonometric_error),
        polar * Rounded(np.where(swap, cosine, sine), trigonometric_error),
    )


def pixels(u: Array) -> Rounded:
    """uint8 to [-1, 1]: u * (2 / 255) - 1."""
    return total(Rounded.exact(u) * Rounded.constant(2 / 255), Rounded.exact(-1.0))


def q_sample(x_start: Rounded, eps: Rounded, columns: Array) -> Rounded:
    """x_t = a x_0 + b eps (Ho et al. 2020, equation 4); columns [B, >= 2]: each sample's row of the training table."""
    return total(_spread(columns[:, 0]) * x_start, _spread(columns[:, 1]) * eps)


def mse(
    output: Rounded, x_start: Rounded, eps: Rounded, columns: Array, weight: Array, grad_scale: float
) -> tuple[Rounded, Rounded]:
    """Per-sample weight * mean((output - target)^2) and grad_scale times its gradient in output.

    target = columns[:, 2] * x_start + columns[:, 3] * eps (columns [B, 4]).
    """
    error = total(output, -total(_spread(columns[:, 2]) * x_start, _spread(columns[:, 3]) * eps))
    square = error * error
    axes = (1, 2, 3)
    n = int(np.prod(square.value.shape[1:]))
    size = square.size.sum(axes)
    sum_of_squares = Rounded(square.value.sum(axes), square.error.sum(axes) + (n - 1) * U * size)
    # computed with a division or with a rounded 1 / n: both within the division's bound
    loss = Rounded.exact(weight) * (sum_of_squares / Rounded.exact(float(n)))
    factor = _spread(weight) * Rounded.constant(grad_scale) * Rounded.constant(2 / n)
    return loss, factor * error


def p_sample(
    row: Mapping[str, Rounded],
    h: list[Rounded],
    x: Rounded,
    m: Rounded,
    *,
    m_uncond: Rounded | None = None,
    slots: list[Rounded] | None = None,
    v: Rounded | None = None,
    z: Rounded | None = None,
    threshold: Rounded | None = None,
    rescale: Rounded | None = None,
    grad: Rounded | None = None,
    mask: Rounded | None = None,
    known: Rounded | None = None,
) -> dict[str, Rounded]:
    """The formulas of `fastdiff.table`, line by line; row and h hold each sample's coefficients.

    Returns x, x0, y (what a slot takes) and model_input.
    """
    if m_uncond is not None:
        m = total(m_uncond, row["g"] * total(m, -m_uncond))
    if rescale is not None:
        m = rescale * m
    if grad is not None:
        m = total(m, row["mg"] * grad)
    x0 = total(row["px"] * x, row["pm"] * m)
    x0 = x0.clamp(row["lim"]) if threshold is None else x0.clamp(threshold) / threshold
    y = total(row["ux"] * x, row["u0"] * x0, row["um"] * m)
    terms = [row["cx"] * x, row["c0"] * x0, row["cm"] * m]
    terms += [coefficient * slot for coefficient, slot in zip(h, slots or [])]
    factor = None if v is None else (row["lv"] * v).exp()
    if z is not None:
        terms.append((row["cz"] if factor is None else row["cz"] * factor) * z)
    if grad is not None:
        terms.append((row["vg"] if factor is None else row["vg"] * (factor * factor)) * grad)
    x_next = total(*terms)
    if mask is not None and known is not None:
        kept = row["k0"] * known if z is None else total(row["k0"] * known, row["kz"] * z)
        x_next = total(mask * kept, total(Rounded.exact(1.0), -mask) * x_next)
    return {"x": x_next, "x0": x0, "y": y, "model_input": row["c_next"] * x_next}


def _spread(value: Array) -> Rounded:
    """Per-sample values [B] against [B, C, H, W]."""
    return Rounded.exact(np.asarray(value)[:, None, None, None])
