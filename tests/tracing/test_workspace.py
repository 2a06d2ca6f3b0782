"""What is said of a kernel's own memory, against what it allocates."""

import gc

import pytest
import torch

from assign.errors import TraceError
from assign.tracing import workspace
from assign.tracing.measuring import count_bytes, measure_peak
from assign.tracing.workspace import scratch_of

aten = torch.ops.aten
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def convolved(source, weight, stride=1, padding=0, groups=1, dilation=1):
    """Scratch memory of a convolution in bytes: measured (forward, backward) and predicted (forward, backward)."""
    dims = source.dim() - 2
    options = [stride] * dims, [padding] * dims, [dilation] * dims, False, [0] * dims, groups
    forward = source, weight, None, *options
    used, (result,) = measured(aten.convolution.default, *forward)
    backward = torch.ones_like(result), source, weight, [0], *options, [True, True, False]
    used_backward, results = measured(aten.convolution_backward.default, *backward)
    said = scratch_of(aten.convolution.default, forward, {}, result)
    return (used, used_backward), (said, scratch_of(aten.convolution_backward.default, backward, {}, results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize(
    ("source", "weight", "options"),
    [
        ((8, 64, 20, 20), (96, 64, 3, 3), {"padding": 1}),
        ((8, 64, 20, 20), (96, 64, 3, 3), {"padding": 1, "stride": 2}),
        ((8, 64, 4, 4), (96, 64, 3, 3), {"padding": 1}),
        ((2, 3, 128, 128), (32, 3, 32, 32), {"stride": 32}),
        ((8, 3, 64, 64), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
        ((8, 96, 16, 16), (96, 1, 7, 7), {"padding": 3, "groups": 96}),
        ((8, 64, 16, 16), (64, 16, 3, 3), {"padding": 1, "groups": 4}),
        ((8, 32, 16, 16), (32, 32, 3, 3), {"padding": 2, "dilation": 2}),
        ((8, 32, 16, 16), (64, 32, 1, 1), {}),
    ],
    ids=["3x3", "strided", "large weights", "patches", "stem", "depthwise", "grouped", "dilated", "1x1"],
)
def test_what_a_convolution_allocates(source, weight, options, layout, dtype):
    """oneDNN chooses a kernel by shape and layout, and each kernel allocates differently."""
    known = LAYOUTS[layout](torch.ones(source).to(dtype)), LAYOUTS[layout](torch.ones(weight).to(dtype))
    used, said = convolved(*known, **options)
    assert said == pytest.approx(used, rel=0.05, abs=2**10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_number_as_option_holds_for_all_dimensions(dtype):
    """PyTorch accepts ``[1]`` for a convolution of any number of dimensions."""
    args = torch.ones(2, 3, 12, 12, dtype=dtype), torch.ones(8, 3, 3, 3, dtype=dtype), None
    said = [
        scratch_of(aten.convolution.default, (*args, *([each] * dims for each in (1, 1, 1)), False, [0], 1), {}, None)
        for dims in (1, 2)
    ]
    assert said[0] == said[1]


def test_a_large_convolution_is_run_on_a_part_of_its_batch(monkeypatch):
    ran = []
    monkeypatch.setattr(workspace, "_WORK", 2 * 10**8)
    run = workspace._run
    monkeypatch.setattr(workspace, "_run", lambda operator, args, *more: ran.append(args) or run(operator, args, *more))
    used, said = convolved(torch.ones(32, 64, 24, 24), torch.ones(64, 64, 3, 3), padding=1)
    assert said == pytest.approx(used, rel=0.05)
    assert len(ran) == 4
    assert all(args[0].shape[0] < 32 for args in ran)


def test_no_garbage_is_collected_while_a_kernel_runs(monkeypatch):
    """What is freed would count as room for what the kernel allocates; to collect it before takes longer than both."""
    collections = []

    def kernel():
        before = [each["collections"] for each in gc.get_stats()]
        cycles = [[] for _ in range(2 * max(gc.get_threshold()[0], 1))]
        for each in cycles:
            each.append(each)
        collections.append(before != [each["collections"] for each in gc.get_stats()])
        return torch.ones(())

    kernel()
    monkeypatch.setattr(gc, "collect", pytest.fail)
    assert workspace._run(kernel, (), (), 1) == 0
    assert collections == [True, False]
    assert gc.isenabled()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_what_attention_allocates(masked, dtype):
    query, key, value = torch.ones(3, 2, 4, 300, 32).to(dtype)
    options = {"attn_mask": torch.zeros(2, 1, 300, 300).to(dtype)} if masked else {}
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    result, sums = forward(query, key, value, **options)
    peak = measure_peak(lambda: forward(query, key, value, **options), [])
    said = scratch_of(forward, (query, key, value), options, None)
    assert said + result.nbytes + sums.nbytes == pytest.approx(peak, rel=0.02)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    known = torch.ones_like(result), query, key, value, result, sums, 0.0, False
    used, _ = measured(lambda *args: backward(*args, **options), *known)
    assert scratch_of(backward, known, options, None) == pytest.approx(used, rel=0.02, abs=2**10)
    assert used > 2**16


@pytest.mark.parametrize("loaded", [torch.float64, torch.bfloat16], ids=str)
def test_attention_with_a_mask_computed_in_other_dtypes_than_loaded(loaded):
    """A kernel refuses a mask in another dtype than its operands, float32 excepted."""
    query, key, value = torch.ones(3, 2, 4, 300, 32).to(loaded)
    forward = aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    masks = torch.zeros(2, 1, 300, 300, dtype=loaded), torch.zeros(2, 1, 300, 300)
    result, sums = forward(query, key, value)
    behind = torch.ones_like(result), query, key, value, result, sums, 0.0, False
    for dtype in (torch.float64, *DTYPES):
        for operator, args in ((forward, (query, key, value)), (backward, behind)):
            said = [scratch_of(operator, args, {"attn_mask": each}, None, dtype) for each in masks]
            assert said[0] == pytest.approx(said[1], rel=0.5)
            assert said[0] > 2**16


def test_a_profiler_of_the_users_own_is_in_the_way():
    source, weight = torch.ones(1, 3, 5, 5), torch.ones(7, 3, 3, 3)
    options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    with torch.profiler.profile(), pytest.raises(TraceError, match="Stop it before"):
        scratch_of(aten.convolution.default, (source, weight, None, *options), {}, None)


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
    assert scratch_of(aten.mm.default, (left, right), {}, result) == pytest.approx(scratch, rel=0.1, abs=2**14)
