"""The paper's accounting (arXiv 2301.13464, A7 of the specification) from plain models, traced: to the last digit."""

import pytest
import torch
import torch.nn.functional as F

from assign.errors import BudgetError
from assign.plan.table import Role
from assign.planner import search_table
from assign.tracing.tracer import trace
from benchmarks.paper.models import MODELS

pytestmark = pytest.mark.slow

BATCH = torch.zeros(128, 3, 32, 32), torch.zeros(128, dtype=torch.long)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def nll(model, batch):
    return F.nll_loss(model(batch[0]), batch[1])


LOSSES = {"squeezenet": nll}  # its log-softmax is part of the model


@pytest.fixture(scope="module", autouse=True)
def no_scratch():
    """Kernels do not run to find their scratch memory, which the paper's numbers do not include: it takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("assign.tracing.tracer.kernel_scratch", lambda _: ())
        yield


@pytest.fixture(scope="module")
def tables(no_scratch):
    return {name: trace(MODELS[name](), BATCH, LOSSES.get(name, cross_entropy)) for name in MODELS}


PARAMETERS = {"resnet18": 11173962, "mobilenet_v2": 2296922, "shufflenet_v2": 1263854, "squeezenet": 734986}


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    assert sum(parameter.numel() for parameter in MODELS[name]().parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("width", [0.25, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_narrow_models_trace(name, width):
    model = MODELS[name](classes=7, width=width)
    batch = torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    table = trace(model, batch, LOSSES.get(name, cross_entropy))
    assert {info.shape for info in table.tensors if info.op == "log_softmax"} == {(4, 7)}
    kept = {info.key for info in table.tensors if info.role is Role.WEIGHT}
    assert kept == {key for key, _ in model.named_parameters()}
    # Convolutions hold almost all parameters; theirs go with the square of the width, a depthwise filter's with itself.
    assert width**2 < sum(p.numel() for p in model.parameters()) / PARAMETERS[name] < 3 * width**2


def test_groups_and_elements(tables):
    sizes = {group.id: group.elements for group in tables["resnet18"].groups}
    assert (len(sizes), tables["resnet18"].elements) == (22, 543364500)
    expected = {0: 789888, 1: 50405632, 3: 67182848, 5: 67272960, 6: 25461248, 7: 16777728, 8: 33849856, 10: 34210304}
    expected |= {12: 8389632, 13: 17957888, 15: 19399680, 17: 4196352, 18: 13109248, 20: 8531988, 21: 5376}
    assert {number: sizes[number] for number in expected} == expected
    assert (len(tables["squeezenet"].groups), tables["squeezenet"].elements) == (27, 356459284)


def test_a_shuffled_block_counts_both_halves(tables):
    # blocks.1 of ShuffleNet, 116 channels of 16×16. Maps of one half (58 channels, 128·58·16·16 elements): the halves
    # themselves; convolution, normalisation and ReLU; the depthwise ones without ReLU; all three again; two in ``cat``.
    # Weights: two 1×1 convolutions, nine per channel of the depthwise one, three normalisations. Gradients double all.
    maps, weights = 2 + 3 + 2 + 3 + 2, 2 * 58 * 58 + 9 * 58 + 3 * 2 * 58
    expected = 2 * (maps * 128 * 58 * 16 * 16 + weights)
    table = tables["shufflenet_v2"]
    own = [row for row in table.paper_tensors if f"{row.module}.".startswith("blocks.1.")]
    assert sum(row.elements for row in own) == expected == 45628252
    halves = [row.key for row in own if row.op == "slice" and row.role is Role.ACTIVATION]
    assert halves == ["blocks.1/slice", "blocks.1/slice#2"]
    waiting = {row.key for row in table.tensors if row.role is Role.SAVED}
    assert {f"{key}.saved" for key in halves} & waiting == {"blocks.1/slice#2.saved"}  # nobody multiplies the first


@pytest.mark.parametrize(
    ("model", "by_elements", "prime"), [("resnet18", 0.27913, 0.2791), ("squeezenet", 0.17337, 0.1528)]
)
def test_operator_based_ratio(tables, model, by_elements, prime):
    assert round(ratio(tables[model], strategy="operator"), 5) == by_elements
    assert round(ratio(tables[model], strategy="operator-prime"), 4) == prime
    with pytest.raises(BudgetError, match="follows from the model alone"):
        search_table(tables[model], strategy="operator", low_ratio=0.5)


@pytest.mark.parametrize(("model", "expected"), [("resnet18", 0.27905), ("squeezenet", 0.17313)])
def test_operator_based_ratio_with_a_hundred_classes(model, expected):
    table = trace(MODELS[model](classes=100), BATCH, LOSSES.get(model, cross_entropy))
    assert round(ratio(table, strategy="operator"), 5) == expected


def ratio(table, **options):
    return search_table(table, space="hfp8", **options).provenance.estimate["low_ratio"]


RATIOS = [  # asked for, groups low, by elements, by bits
    ("resnet18", 0.1, 1, 0.1238, 0.1237), ("resnet18", 0.3, 3, 0.3402, 0.3399), ("resnet18", 0.5, 5, 0.5257, 0.5253),
    ("resnet18", 0.7, 9, 0.7447, 0.7429), ("resnet18", 0.9, 15, 0.9191, 0.9073), ("resnet18", 1.0, 22, 1.0, 0.9794),
    ("squeezenet", 0.1, 1, 0.2295, None), ("squeezenet", 0.5, 4, 0.5298, None), ("squeezenet", 0.9, 15, 0.9128, None),
]  # fmt: skip


@pytest.mark.parametrize(("model", "asked", "groups", "by_elements", "by_bits"), RATIOS)
def test_greedy_ratios(tables, model, asked, groups, by_elements, by_bits):
    found = search_table(tables[model], low_ratio=asked, space="hfp8").provenance.estimate
    assert found["groups_low"] == groups
    assert round(found["low_ratio"], 4) == by_elements
    assert by_bits is None or round(found["low_ratio_bits"], 4) == by_bits
