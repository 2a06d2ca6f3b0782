"""What is said of a kernel's own memory, against what it allocates."""

import itertools

import pytest
import torch

from assign.tasks.batch import count_bytes
from assign.tracing.workspace import scratch_of
from assign.training.measuring import measure_peak

aten = torch.ops.aten
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "neither": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def one_thread():
    """Each thread would transpose images of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(operator, *args):
    """What the operator allocates at its worst moment beside its results; and the results."""
    operator(*args)  # what a library allocates once
    results = []
    peak = measure_peak(lambda: results.append(operator(*args)), [])
    made = results[0] if isinstance(results[0], tuple) else results
    return peak - count_bytes([tensor for tensor in made if tensor is not None]), made


def said(operator, tensors, result):
    return scratch_of(operator, tensors, result)[DTYPES.index(tensors[0].dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [40, 8], ids=["large images", "large weights"])
def test_what_a_convolution_copies_and_reorders(width, stride, dtype):
    torch.manual_seed(0)
    forward, backward = aten.convolution.default, aten.convolution_backward.default
    options = [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1
    for names in itertools.product(LAYOUTS, LAYOUTS, ("contiguous", "channels-last")):
        source = LAYOUTS[names[0]](torch.randn(8, 64, width, width).to(dtype))
        weight = LAYOUTS[names[2]](torch.randn(96, 64, 3, 3).to(dtype))
        scratch, (result,) = measured(forward, source, weight, None, *options)
        assert said(forward, [source, weight], result) == pytest.approx(scratch, rel=0.02, abs=2**16), names
        gradient = LAYOUTS[names[1]](torch.randn(result.shape).to(dtype))
        scratch, results = measured(backward, gradient, source, weight, [0], *options, [True, True, False])
        assert said(backward, [gradient, source, weight], results) == pytest.approx(scratch, rel=0.02, abs=2**16), names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("groups", "size", "stride"), [(96, 3, 1), (96, 3, 2), (96, 7, 1), (6, 3, 1), (6, 3, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_what_a_grouped_convolution_has_in_its_backward_pass(layout, groups, size, stride, dtype):
    torch.manual_seed(0)
    backward = aten.convolution_backward.default
    source, gradient = (LAYOUTS[layout](torch.randn(16, 96, w, w).to(dtype)) for w in (32, 32 // stride))
    weight = torch.randn(96, 96 // groups, size, size).to(dtype)
    options = [stride] * 2, [size // 2] * 2, [1, 1], False, [0, 0], groups
    scratch, results = measured(backward, gradient, source, weight, [0], *options, [True, True, False])
    one_image = 2 * (source[0].nbytes + gradient[0].nbytes)
    assert said(backward, [gradient, source, weight], results) == pytest.approx(scratch, rel=0.01, abs=one_image)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize(
    "sizes",
    [
        (64, 32, 8),
        (32, 64, 1),
        (48, 50, 32),
        (256, 256, 256),
        (512, 256, 64),
        (256, 2048, 256),
        (192, 2048, 576),
        (2048, 192, 576),
        (2048, 768, 192),
    ],
)
def test_what_a_product_in_bf16_packs(sizes, transposed):
    """Blocks have fixed sizes, so that a small product has more beside it than a large one."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("without bf16 instructions torch multiplies in another way")
    rows, inner, columns = sizes
    left = torch.randn(inner, rows).bfloat16().t() if transposed else torch.randn(rows, inner).bfloat16()
    right = torch.randn(inner, columns).bfloat16()
    scratch, (result,) = measured(aten.mm.default, left, right)
    assert said(aten.mm.default, [left, right], result) == pytest.approx(scratch, rel=0.1, abs=2**14)
