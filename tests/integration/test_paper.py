"""The paper's accounting (arXiv 2301.13464, A7 of the specification) from plain models, traced: to the last digit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from assign.errors import BudgetError
from assign.planning import search_table
from assign.tasks.models import ResNet
from assign.tracer import trace

BATCH = torch.zeros(128, 3, 32, 32), torch.zeros(128, dtype=torch.long)


class Fire(nn.Module):
    def __init__(self, channels, squeeze, expand):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeeze, 1)
        self.bn = nn.BatchNorm2d(squeeze)
        self.one = nn.Conv2d(squeeze, expand, 1)
        self.bn_one = nn.BatchNorm2d(expand)
        self.three = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.bn_three = nn.BatchNorm2d(expand)

    def forward(self, x):
        x = F.relu(self.bn(self.squeeze(x)))
        return F.relu(torch.cat([self.bn_one(self.one(x)), self.bn_three(self.three(x))], 1))


class SqueezeNet(nn.Module):
    """CIFAR form: every convolution has a bias, log-softmax inside."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(), nn.MaxPool2d(2, 2))
        sizes = [(96, 16, 64), (128, 16, 64), (128, 32, 128), None, (256, 32, 128), (256, 48, 192), (384, 48, 192)]
        sizes += [(384, 64, 256), None, (512, 64, 256)]
        self.fires = nn.Sequential(*(Fire(*size) if size else nn.MaxPool2d(2, 2) for size in sizes))
        self.last = nn.Conv2d(512, classes, 1)

    def forward(self, x):
        x = F.avg_pool2d(self.last(self.fires(self.stem(x))), 4)
        return F.log_softmax(x.flatten(1), 1)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def nll(model, batch):
    return F.nll_loss(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def tables():
    resnet = ResNet(channels_in=3, widths=(64, 128, 256, 512), blocks=2, classes=10)
    return {"resnet": trace(resnet, BATCH, cross_entropy), "squeezenet": trace(SqueezeNet(), BATCH, nll)}


def test_groups_and_elements(tables):
    sizes = {group.id: group.elements for group in tables["resnet"].groups}
    assert (len(sizes), tables["resnet"].elements) == (22, 543364500)
    expected = {0: 789888, 1: 50405632, 3: 67182848, 5: 67272960, 6: 25461248, 7: 16777728, 8: 33849856, 10: 34210304}
    expected |= {12: 8389632, 13: 17957888, 15: 19399680, 17: 4196352, 18: 13109248, 20: 8531988, 21: 5376}
    assert {number: sizes[number] for number in expected} == expected
    assert (len(tables["squeezenet"].groups), tables["squeezenet"].elements) == (27, 356459284)


@pytest.mark.parametrize(("model", "expected"), [("resnet", 0.27913), ("squeezenet", 0.17337)])
def test_operator_based_ratio(tables, model, expected):
    plan = search_table(tables[model], strategy="operator", recipe="hfp8")
    assert round(plan.provenance.estimate["low_ratio"], 5) == expected
    with pytest.raises(BudgetError, match="follows from the model alone"):
        search_table(tables[model], strategy="operator", low_ratio=0.5)


RATIOS = [
    ("resnet", 0.1, 1, 0.1238), ("resnet", 0.3, 3, 0.3402), ("resnet", 0.5, 5, 0.5257), ("resnet", 0.7, 9, 0.7447),
    ("resnet", 0.9, 15, 0.9191), ("resnet", 1.0, 22, 1.0),
    ("squeezenet", 0.1, 1, 0.2295), ("squeezenet", 0.5, 4, 0.5298), ("squeezenet", 0.9, 15, 0.9128),
]  # fmt: skip


@pytest.mark.parametrize(("model", "ratio", "groups", "achieved"), RATIOS)
def test_greedy_ratios(tables, model, ratio, groups, achieved):
    plan = search_table(tables[model], low_ratio=ratio, recipe="hfp8")
    assert plan.provenance.estimate["groups_low"] == groups
    assert round(plan.provenance.estimate["low_ratio"], 4) == achieved
