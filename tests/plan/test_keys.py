"""Keys are made and parsed by one module, and every key of a real step comes back as it was."""

import ast
import copy
from pathlib import Path

import pytest
from helpers import adamw, all_low, traced
from hypothesis import given
from hypothesis import strategies as st
from models import ResNet, class_loss, images

import assign
from assign.plan.keys import Key, Part, activation_key, base_key, buffer_key, is_saved_key, state_key
from assign.plan.plan import Entry
from assign.plan.table import Role
from assign.planner import search_table
from assign.training.trials import Settings, Trainer

PACKAGE = Path(assign.__file__).parent
WORDS = st.text(st.sampled_from("abz_019"), min_size=1)
PATHS = st.lists(WORDS, min_size=1, max_size=4).map(".".join)


@given(PATHS, st.sampled_from([*Part]), WORDS)
def test_a_key_comes_back_from_its_text(name, part, state):
    key = Key(name, part, state if part is Part.STATE else "")
    assert Key.of(str(key), part) == key
    assert Key.parse(str(key), {name, f"{name}.grad"}) == key


@given(PATHS, WORDS, st.integers(1, 30))
def test_an_activation_says_its_module_and_its_operator(module, operator, number):
    key = Key(activation_key(module, operator, number))
    assert (key.module, key.first) == (module, activation_key(module, operator))
    assert (key.is_activation, key.is_repeated) == (True, number > 1)


def test_only_a_suffix_of_a_weight_is_something_stored():
    keys = {"w", "w.grad", "master", "a/relu"}
    assert Key.parse("w.master", keys) == Key("w", Part.MASTER)
    assert Key.parse("w.grad.stored", keys) == Key("w", Part.STORED_GRADIENT)
    assert Key.parse("w.optim.exp_avg", keys) == Key("w", Part.STATE, "exp_avg")
    for text in ("w", "w.grad", "w.saved", "master", "v.master", "a/relu.master", ".optim.x", "a.optim.w"):
        assert not Key.parse(text, keys).is_of_weight, text


def test_a_weight_called_buffer_is_none():
    assert Key.parse("bn.mean.buffer", {"bn.weight"}) == Key("bn.mean", Part.BUFFER)
    for text, keys in (
        ("replay.buffer.grad", {"replay.buffer", "replay.buffer.grad"}),
        ("replay.buffer.grad", {"replay"}),
        ("replay.buffer", {"replay.buffer", "replay.buffer.grad"}),
        ("a/relu.buffer", {"w"}),
        (".buffer", {"w"}),
        ("w.master", {"w"}),
    ):
        assert Key.parse(text, keys).part is not Part.BUFFER, text


def test_inputs_and_the_loss_are_known_by_their_names():
    assert Key("/input#2").is_input
    assert not Key("a/input").is_input
    assert Key("loss/mul").is_of_loss
    assert not Key("loss.weight").is_of_loss
    assert Key.of_step("fc.weight.grad").module == "fc"
    assert Key("/add").module == ""


def test_every_row_of_a_step_belongs_to_a_row():
    table = traced(ResNet(), images(), optimizer=adamw)
    owners = {row.key for row in table.tensors if row.role in (Role.WEIGHT, Role.ACTIVATION)}
    for row in table.tensors:
        assert str(row.parts) == row.key
        assert row.role is Role.BUFFER or row.parts.name in owners, row.key
        if row.role is not Role.BUFFER:
            assert Key.parse(row.key, owners) == row.parts
    assert base_key(state_key("w", "exp_avg")) == state_key("w", "exp_avg")
    assert not is_saved_key(buffer_key("w"))


def test_no_other_module_parses_keys():
    """A suffix as a literal, or a name split at its slash or number, would be a second place that knows keys."""
    suffixes = {part.value for part in Part} - {""}
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("keys.py", "_torch.py"):
            continue
        tree = ast.parse(path.read_text())
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        found += [(path.name, text) for text in texts if text in suffixes]
    assert found == []


@pytest.fixture(scope="module")
def standalone():
    model, batch = ResNet(), images()
    table = traced(model, batch, optimizer=adamw)
    plan = search_table(table, strategy="standalone", space="bf16")
    assert {buffer_key(name) for name in table.buffers} <= plan.entries.keys()
    return model, batch, table, plan


def test_a_plan_with_buffers_fits_its_model_in_a_rehearsal(standalone):
    model, batch, table, plan = standalone
    found = assign.rehearse(copy.deepcopy(model), batch, class_loss, plan, table)
    assert found.peak_bytes < assign.rehearse(model, batch, class_loss, all_low(table, "bf16"), table).peak_bytes


def test_a_plan_with_buffers_may_be_a_start_of_a_study(standalone):
    table = standalone[2]
    plan = all_low(table, "bf16").replace({buffer_key(name): Entry("bf16", False) for name in table.buffers})
    trainer = Trainer(
        make_task=lambda _: None, settings=Settings(space="bf16"), table=table, complete=lambda entries: dict(entries),
        budget=None,
    )  # fmt: skip
    assert trainer._low_of(plan) <= {group.id for group in table.groups}


def test_a_plan_that_does_not_fit_says_where_it_was_given(standalone):
    table, plan = standalone[2:]
    plan.check_fits(table, where="here")
    other = traced(ResNet(blocks=1), images(), optimizer=adamw)
    with pytest.raises(assign.errors.PlanError, match=r"^here does not fit this model"):
        plan.check_fits(other, where="here")
