"""Gradients that are added to a stored sum one after another."""

import pytest
import torch

from assign.numerics.rounding import draw_seed, key_of
from assign.optim.summing import add_gradient
from assign.plan.persistent_state import SUM_PIECE
from assign.tracing.measuring import measure_peak


def parameter(total, dtype):
    made = torch.nn.Parameter(torch.zeros(total.shape, dtype=dtype))
    made.grad = total.to(dtype)
    return made


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_sum_is_a_plain_sum(layout, dtype):
    torch.manual_seed(0)
    total = torch.randn(300, 500)
    gradient = (torch.randn(300, 500) if layout == "rows" else torch.randn(500, 300).t()).to(dtype)
    summed = parameter(total.clone(), torch.float32)
    add_gradient(summed, gradient, torch.float32)
    assert torch.equal(summed.grad, total + gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_sum_keeps_small_gradients_in_the_mean(dtype):
    """Rounded to nearest, 1 + 2^-12 stays 1 in both dtypes, also after 2048 of them."""
    torch.manual_seed(0)
    elements, parts = 512, 2048
    by_chance, to_nearest = (parameter(torch.ones(elements), dtype) for _ in range(2))
    small = torch.full((elements,), 2.0**-12)
    for _ in range(parts):
        add_gradient(by_chance, small, dtype, key_of(draw_seed(), 7))
        add_gradient(to_nearest, small, dtype)
    assert torch.equal(to_nearest.grad, torch.ones(elements, dtype=dtype))
    # The sum is 1.5. A rounding to a step s from a share p of it has the variance p(1 - p)s² < ps², here with
    # p·s = 2^-12: 2048 · 2^-12 · 2^-7 for bf16. Six standard deviations of the mean over the elements:
    deviation = (parts * 2.0**-12 * 2.0**-7 / elements) ** 0.5
    assert abs(by_chance.grad.float().mean() - 1.5) < 6 * deviation


def test_random_bits_follow_the_key_and_differ_between_pieces():
    elements = 4 * SUM_PIECE
    sums = [parameter(torch.ones(elements), torch.bfloat16) for _ in range(3)]
    for each, seed in zip(sums, (1, 1, 2), strict=True):
        add_gradient(each, torch.full((elements,), 2.0**-9), torch.bfloat16, key_of(torch.tensor(seed), 0))
    assert torch.equal(sums[0].grad, sums[1].grad)
    assert not torch.equal(sums[0].grad, sums[2].grad)
    first, second = sums[0].grad.split(SUM_PIECE)[:2]
    assert not torch.equal(first, second)


def test_the_first_gradient_is_rounded_to_nearest_and_laid_out_as_the_parameter():
    made = torch.nn.Parameter(torch.zeros(4, 6))
    gradient = torch.randn(6, 4).t()
    add_gradient(made, gradient, torch.bfloat16, key_of(torch.tensor(0), 0))
    assert made.grad.dtype == torch.bfloat16
    assert made.grad.stride() == made.stride()
    assert torch.equal(made.grad, gradient.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_sum_needs_little_temporary_memory(dtype):
    elements = 32 * SUM_PIECE
    made = parameter(torch.ones(elements // 64, 64), dtype)
    gradient = torch.ones(64, elements // 64, dtype=torch.bfloat16).t()
    key = key_of(torch.tensor(0), 0)
    add_gradient(made, gradient, dtype, key)  # compiles the rounding
    peak = measure_peak(lambda: add_gradient(made, gradient, dtype, key), [])
    assert peak <= 16 * SUM_PIECE
