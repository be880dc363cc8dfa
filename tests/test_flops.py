"""Counted operations agree with formulas, eager and compiled, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.flops import count_flops, matmul_rate


def test_matrix_product_and_convolution(device):
    a, b = torch.randn(3, 5, device=device), torch.randn(5, 7, device=device)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    x, w = torch.randn(2, 4, 6, 6, device=device), torch.randn(8, 4, 3, 3, device=device)
    assert count_flops(lambda: F.conv2d(x, w, padding=1)) == 2 * 2 * 6 * 6 * 8 * 4 * 9


def test_backward_of_a_convolution_costs_twice_the_forward(device):
    x = torch.randn(2, 4, 6, 6, device=device, requires_grad=True)
    w = torch.randn(8, 4, 3, 3, device=device, requires_grad=True)
    forward = count_flops(lambda: F.conv2d(x, w))
    assert count_flops(lambda: F.conv2d(x, w).sum().backward()) == 3 * forward


@pytest.mark.parametrize("train", [False, True])
def test_attention(train):
    batch, heads, tokens, width = 2, 3, 16, 8
    q, k, v = (torch.randn(batch, heads, tokens, width, requires_grad=train) for _ in range(3))

    def call():
        attended = F.scaled_dot_product_attention(q, k, v)
        if train:
            attended.sum().backward()

    product = 2 * batch * heads * tokens * tokens * width
    # forward two products; backward those of dQ, dK, dV and of dP, and QK^T once more
    assert count_flops(call) == (2 + 5 * train) * product


def test_a_compiled_function_is_counted_as_it_runs_eagerly():
    a = torch.randn(3, 3)
    compiled = torch.compile(lambda x: torch.relu(x @ x), backend="eager")
    compiled(a)
    assert count_flops(lambda: compiled(a)) == 2 * 27


def test_matmul_rate(device):
    assert matmul_rate(device, torch.float32) > 0
