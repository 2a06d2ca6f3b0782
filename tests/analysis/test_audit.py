"""What 16 bits would lose, said before: constants, and the range of a checkpoint; and that it is so."""

import copy
import dataclasses
import json
import math
import warnings

import pytest
import torch
from shell import fails, run
from torch import nn
from torch.nn import functional as F

from assign.analysis.audit import PrecisionWarning, audit_constants, audit_range
from assign.errors import FormatError, TaskError
from assign.optim import updates
from assign.tasks import TaskOptions, load_task
from assign.tasks.data import read_digits
from assign.training.loop import train
from assign.training.weights import load_weights

BETAS = (0.9, 0.99)  # survive in bf16 too


def findings(model, optimizer=None, **options):
    return audit_constants(model, optimizer, action="return", **options)


def adam_step(eps, kind=torch.optim.Adam):
    """arXiv 2305.10947's example: weights of 1 and these gradients, all in fp16."""
    w = nn.Parameter(torch.ones(4, dtype=torch.float16))
    w.grad = torch.tensor([0, 1e-3, 5e-3, 0.1]).half()
    optimizer = kind([w], lr=1e-3, eps=eps, weight_decay=0)
    found = findings(nn.ParameterList([w]), optimizer)
    optimizer.step()
    return w.detach(), found


# ---- constants


@pytest.mark.parametrize("kind", [torch.optim.Adam, updates.AdamW])
@pytest.mark.parametrize(
    ("eps", "becomes", "expected"),
    [
        (1e-8, 0, [math.nan, -math.inf, -math.inf, 0.99902]),
        (1e-7, 1.192e-7, [1, -7.39, -40.97, 0.99902]),
        (1e-4, None, [1, 0.99023, 0.95020, 0.99902]),
    ],
)
def test_what_is_found_is_what_goes_wrong(kind, eps, becomes, expected):
    w, found = adam_step(eps, kind)
    torch.testing.assert_close(w.float(), torch.tensor(expected), rtol=1e-3, atol=1e-5, equal_nan=True)
    assert [(f.name, f.becomes) for f in found] == ([] if becomes is None else [("eps", pytest.approx(becomes, 1e-3))])
    for each in found:
        assert findings(nn.Linear(1, 1).half(), torch.optim.Adam([nn.Parameter(w)], eps=each.advice)) == ()


@pytest.mark.parametrize(
    ("eps", "becomes"), [(1e-8, 0), (1e-7, 1.192e-7), (1e-6, 1.0133e-6), (1e-5, 1.0014e-5), (1e-4, None), (0.0, None)]
)
def test_an_epsilon_has_to_be_a_normal_number(eps, becomes):
    found = findings(nn.LayerNorm(4, eps=eps).half())
    assert [f.becomes for f in found] == ([] if becomes is None else [pytest.approx(becomes, 1e-3)])
    assert {f.why for f in found} <= {"it protects against no division by zero", "it is subnormal and loses bits"}
    assert findings(nn.LayerNorm(4, eps=eps).bfloat16()) == ()


class Norm(nn.Module):
    """As transformers writes it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.variance_epsilon = 1e-6


def test_each_layer_and_group_in_its_own_dtype():
    model = nn.Sequential(
        nn.BatchNorm1d(4).half(),
        nn.BatchNorm1d(4),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.LayerNorm(4).bfloat16(),
        Norm().half(),
        nn.BatchNorm1d(4, affine=False).half(),
    )
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    found = findings(model, torch.optim.Adam(groups, betas=BETAS))
    assert [(f.where, f.name, f.format, f.advice) for f in found] == [
        ("0", "eps", "fp16", pytest.approx(1e-3)),
        ("2", "eps", "fp16", pytest.approx(1e-4)),
        ("4", "variance_epsilon", "fp16", pytest.approx(1e-4)),
        ("5", "eps", "fp16", pytest.approx(1e-3)),
        ("optimizer, group 0", "eps", "fp16", pytest.approx(1e-4)),
    ]
    assert findings(nn.Sequential(nn.BatchNorm1d(4)), torch.optim.Adam([torch.ones(1)])) == ()
    before = findings(nn.BatchNorm1d(4), torch.optim.Adam([torch.ones(1)]), format="fp16")
    assert [(f.where, f.format) for f in before] == [("BatchNorm1d", "fp16"), ("optimizer, group 0", "fp16")]


@pytest.mark.parametrize(
    ("beta", "why"),
    [
        (0.999, "a moment in this format never decreases"),
        (0.997, "some values of a moment in this format never decrease"),
        (0.996, None),
    ],
)
def test_a_moment_that_never_falls(beta, why):
    """torch's AdamW in bf16, with gradients that have died away: how many values of the second moment go on falling."""
    w = nn.Parameter(torch.ones(128, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([w], betas=(0.9, beta))
    found = findings(nn.ParameterList([w]), optimizer)
    assert [(f.name, f.why) for f in found] == ([] if why is None else [("betas[1]", why)])
    w.grad = torch.ones_like(w)
    optimizer.step()
    moment = optimizer.state[w]["exp_avg_sq"]
    moment.copy_(torch.linspace(1, 2, 129)[:-1])
    w.grad = torch.zeros_like(w)
    before = moment.clone()
    optimizer.step()
    falling = (moment < before).double().mean()
    assert falling == {0.999: 0, 0.996: 1}.get(beta, falling)
    assert beta != 0.997 or 0 < falling < 1
    assert findings(nn.Linear(1, 1), torch.optim.RMSprop([w], alpha=beta))[0].name == "alpha" if why else True


def test_warns_raises_or_returns():
    model = nn.BatchNorm1d(4).half()
    text = (
        "BatchNorm1d: eps=1e-05 is 1.001e-05 in fp16: it is subnormal and loses bits.\n"
        "  Allowed: 0.001 or more.\n  Set eps=0.001, or keep this part in float32."
    )
    with pytest.warns(PrecisionWarning) as seen:
        found = audit_constants(model)
    assert [str(each.message) for each in seen] == [text] == [str(each) for each in found]
    with pytest.raises(FormatError) as caught:
        audit_constants(model, action="raise")
    assert str(caught.value) == text
    with warnings.catch_warnings(action="error"):
        assert findings(model) == found
        audit_constants(nn.BatchNorm1d(4, eps=1e-3).half(), action="raise")
    (slow,) = findings(model, torch.optim.Adam([torch.ones(1)], betas=(0.9, 0.999)), format="bf16")
    assert str(slow) == (
        "optimizer, group 0: betas[1]=0.999 is 1 in bf16: a moment in this format never decreases.\n"
        "  Allowed: 0.996 or less.\n  Set betas[1]=0.996, or keep this part in float32."
    )
    with pytest.raises(FormatError, match=r"action is 'shout'.\n  Allowed: warn, raise, return"):
        audit_constants(model, action="shout")


# ---- range


def with_grad(values, grad):
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor(values))
    model.w.grad = torch.tensor(grad)
    return model


def test_range_by_hand():
    """fp16: smallest 2^-24; the last bit of 1 is 2^-10, that of small numbers 2^-24; an update has to be half of it."""
    tiny = 2.0**-25
    weights = [1.0, 1.0, 2.0**-20, 2.0**-20, tiny, 7e4, 0.0]
    model = with_grad(weights, [2.0**-11, 2.0**-12, 2.0**-24, 2.0**-26, tiny, 0.0, 2.0**-20])
    report = audit_range(model, torch.optim.SGD(model.parameters(), lr=1.0))
    (row,) = report.rows
    assert row == dataclasses.replace(report.weights, name="w")
    assert (row.elements, row.overflowing, report.fits) == (7, 1, False)
    assert row.largest == pytest.approx(7e4)
    assert row.small == 1 / 6  # of those not zero
    assert row.small_gradients == 2 / 6  # 2^-26 and tiny
    assert row.lost_updates == 2 / 6  # 2^-12 at 1, 2^-26 at 2^-20
    assert model.w[0] == 1  # a look, no step
    json.dumps(report.to_json())


def test_what_is_counted_as_lost_does_not_move():
    """Away from ties, where the even neighbour decides, and from powers of two, below which bits are half as large."""
    values = (1 + torch.rand(4000)) * 2.0 ** torch.randint(-14, 10, (4000,))
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        grads = torch.randn(4000) * values * torch.finfo(dtype).eps
        w = values.to(dtype).float()
        model = with_grad(w.tolist(), grads.tolist())
        report = audit_range(model, torch.optim.SGD(model.parameters(), lr=0.5), format=name)
        still = (w - 0.5 * grads).to(dtype).float() == w
        assert report.weights.lost_updates == pytest.approx(still.double().mean().item(), abs=0.002)
        assert 0.1 < report.weights.lost_updates < 0.95


def test_the_update_is_the_optimizers_own():
    """Adam's first step is ±lr, however small the gradient is."""
    model = with_grad([1.0, 1.0], [1e-6, -1e-6])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    row = audit_range(model, optimizer).weights
    assert (row.small_gradients, row.lost_updates) == (1, 0)
    assert audit_range(model, torch.optim.SGD(model.parameters(), lr=1e-2)).weights.lost_updates == 1
    optimizer.step()
    rows = {row.name: row for row in audit_range(model, optimizer).rows}
    assert rows["w.optim.exp_avg_sq"].small == 1  # .001 · g²: 1e-15
    assert rows["w.optim.exp_avg"].small == 0
    assert "w.optim.step" not in rows


def test_buffers_are_stored_too():
    model = nn.BatchNorm1d(2)
    model.running_var.fill_(1e6)
    model(torch.randn(4, 2)).sum().backward()
    report = audit_range(model, torch.optim.SGD(model.parameters(), lr=0.1))
    rows = {row.name: row for row in report.rows}
    assert set(rows) == {"weight", "bias", "running_mean", "running_var"}
    assert rows["running_var"].overflowing == 2
    assert report.weights.overflowing == 0
    assert not report.fits
    assert audit_range(model, torch.optim.SGD(model.parameters(), lr=0.1), format="bf16").fits


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_checkpoint_that_is_not_finite_does_not_fit(value):
    report = audit_range(model := with_grad([1.0, value], [0.1, 0.1]), torch.optim.SGD(model.parameters(), lr=0.1))
    assert (report.fits, report.weights.overflowing) == (False, 1)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["weights"]["largest"] is None


def test_range_says_what_it_needs():
    model = nn.Linear(2, 2)
    with pytest.raises(TaskError, match=r"no parameter has a gradient.*\n.*\n  Call loss.backward\(\) first"):
        audit_range(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(TaskError, match=r"LBFGS\.step\(\) cannot be called without arguments"):
        audit_range(model, torch.optim.LBFGS(model.parameters()))


# ---- going on in fp16: arXiv 2311.18587


def stored_bytes(model, optimizer):
    states = [s for state in optimizer.state.values() for s in state.values()]
    return sum(t.nbytes for t in (*model.parameters(), *states))


@torch.no_grad()
def share_right(model, images, labels):
    dtype = next(model.parameters()).dtype
    return (model.eval()(images.to(dtype)).argmax(1) == labels).double().mean().item()


@pytest.mark.slow
def test_an_fp32_checkpoint_goes_on_in_fp16():
    """The cast changes the accuracy by at most 0.1 points, three epochs more by at most 0.3, of all 1797 images."""
    pytest.importorskip("sklearn")
    images, labels = read_digits()
    images = F.interpolate((images - 0.305) / 0.376, size=(16, 16), mode="bilinear")
    task = load_task("digits", TaskOptions(width=0.5))
    wide = train(task).model
    narrow = copy.deepcopy(wide).half()
    for module in narrow.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    ran = {}
    for model in (wide, narrow):
        optimizer = updates.SGD(model.parameters(), lr=0.02, momentum=0.9)
        dtype = next(model.parameters()).dtype
        before = share_right(model, images, labels)
        torch.manual_seed(1)
        for x, y in [batch for _ in range(3) for batch in task.train]:
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x.to(dtype)), y).backward()
            optimizer.step()
        ran[dtype] = before, share_right(model, images, labels), stored_bytes(model, optimizer)
    (cast, end, size), (cast32, end32, size32) = ran[torch.float16], ran[torch.float32]
    assert abs(cast - cast32) <= 0.001
    assert abs(end - end32) <= 0.003
    assert min(end, end32) > 0.97
    assert 2 * size == size32


# ---- checkpoints and the shell

TASK = """
import torch
from torch import nn
import assign

def task():
    data = [(torch.randn(32, 8), torch.randn(32, 1)) for _ in range(4)]
    return assign.Task(
        model=lambda: nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Linear(64, 1)),
        loss=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
        train=data,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        epochs=1,
    )
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_audit_in_a_shell(here):
    run("train", "mine.py", "--checkpoint", "c.pt")
    output = run("audit", "mine.py", "--checkpoint", "c.pt", "--json", "a.json")
    for words in ("Constants that are lost", "optimizer, group 0", "0.0001", "all weights", "Nothing overflows."):
        assert words in output
    found = json.loads((here / "a.json").read_text())
    assert [each["where"] for each in found["constants"]] == ["1", "optimizer, group 0"]
    assert found["range"]["fits"]
    assert found["range"]["weights"]["elements"] == 8 * 64 + 64 + 64 + 64 + 64 + 1
    names = {row["name"] for row in found["range"]["tensors"]}
    assert {"0.weight", "1.running_var", "0.weight.optim.exp_avg_sq"} <= names  # the checkpoint's states
    state = torch.load("c.pt", weights_only=True)["model"]
    state["0.weight"] *= 1e7
    torch.save(state, "huge.pt")
    assert "it would be infinite" in run("audit", "mine.py", "--checkpoint", "huge.pt", code=1)
    assert "betas[1]" in run("audit", "mine.py", "--format", "bf16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no checkpoint c.pt; nearest: 'd.pt'. Give a file"),
        (b"no checkpoint", "the checkpoint c.pt does not fit this model:"),
        ({"2.weight": torch.ones(3)}, "the checkpoint c.pt does not fit this model:"),
        (torch.ones(3), "the checkpoint c.pt does not fit this model:"),
    ],
)
def test_checkpoints_that_do_not_fit(here, monkeypatch, capsys, content, message):
    (here / "d.pt").write_bytes(b"")
    if isinstance(content, bytes):
        (here / "c.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, "c.pt")
    assert message in fails(capsys, monkeypatch, "audit", "mine.py", "--checkpoint", "c.pt")


def test_a_saved_state_dict_is_a_checkpoint(tmp_path):
    saved, model = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    load_weights(tmp_path / "w.pt", model)
    assert torch.equal(model.weight, saved.weight)
