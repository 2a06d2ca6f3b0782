"""Recipes: the two rows of the table, and what makes a row a sound one."""

import pytest
import torch.nn.functional
from contracts import Rows, chain

from assign.errors import FormatError
from assign.plan.plan import Entry
from assign.plan.recipes import LOSS_OPS, RECIPES, Recipe, get_recipe, initial, save
from assign.plan.table import PAPER_ROLES, Role, TensorInfo, TensorTable


def names(recipe: str, role: Role, op: str = "relu") -> tuple[str, str]:
    info = TensorInfo(key="k", role=role, shape=(), elements=1, dtype="float32", op=op)
    pair = get_recipe(recipe).candidates(info)
    return pair.hi.name, pair.lo.name


def test_hfp8_is_the_papers() -> None:
    assert names("hfp8", Role.ACTIVATION) == names("hfp8", Role.WEIGHT) == ("fp(6,9,0)", "fp(4,3,4)")
    assert names("hfp8", Role.ACTIVATION_GRAD) == ("fp(6,9,0)", "fp(5,2,0)")
    assert names("hfp8", Role.WEIGHT_GRAD) == ("fp(6,9,0)", "fp(6,9,0)")
    assert names("hfp8", Role.ACTIVATION, "log_softmax") == ("fp(6,9,0)", "fp(4,3,4)")
    assert get_recipe("hfp8").loss_scaling


def test_native() -> None:
    assert names("native", Role.ACTIVATION) == names("native", Role.WEIGHT, "parameter") == ("bf16", "e4m3:pow2")
    assert names("native", Role.ACTIVATION_GRAD) == ("bf16", "e5m2:pow2")
    assert names("native", Role.WEIGHT_GRAD, "parameter") == ("bf16", "bf16")
    for role in (Role.ACTIVATION, Role.ACTIVATION_GRAD):
        assert names("native", role, "log_softmax") == ("fp32", "bf16")
        assert names("native", role, "cross_entropy") == ("fp32", "fp32")
    assert not get_recipe("native").loss_scaling


def test_posit_is_positnns() -> None:
    for role in PAPER_ROLES:
        assert names("posit", role) == ("posit(16,2):quire", "posit(8,2):quire")
    for op in ("log_softmax", "nll_loss", "cross_entropy"):
        for role in (Role.ACTIVATION, Role.ACTIVATION_GRAD):
            assert names("posit", role, op) == ("posit(16,2):quire", "posit(16,2):quire")
    assert not get_recipe("posit").loss_scaling
    assert get_recipe("posit").promote_every == 0


def test_every_loss_of_torch_is_known() -> None:
    functions = dir(torch.nn.functional)
    losses = {name for name in functions if name.endswith(("_loss", "cross_entropy", "_logits", "kl_div"))}
    assert len(losses) > 20
    assert losses <= LOSS_OPS


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_rows_are_sound(recipe: Recipe) -> None:
    assert RECIPES[recipe.name] is recipe
    assert recipe.by_role.keys() == PAPER_ROLES
    assert recipe.description
    for op in ("relu", *recipe.overrides):
        assert recipe.overrides.get(op, {}).keys() <= PAPER_ROLES
        for role in PAPER_ROLES:
            info = TensorInfo(key="k", role=role, shape=(), elements=1, dtype="float32", op=op)
            pair = recipe.candidates(info)
            assert pair.lo.bits <= pair.hi.bits


@pytest.mark.parametrize("role", sorted(set(Role) - PAPER_ROLES))
def test_other_roles_have_no_candidates(role: Role) -> None:
    with pytest.raises(FormatError, match=f"'k'.*{role}"):
        names("native", role)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(
        FormatError,
        match=r"no recipe 'nativ'; choose from bf16, fp16, hfp8, native, native-delayed, posit\. Did you mean 'native'",
    ):
        get_recipe("nativ")
    with pytest.raises(FormatError, match="choose from bf16, fp16, hfp8, native"):
        get_recipe("")


def test_initial_makes_one_entry_per_tensor() -> None:
    table = chain(4, 8, 8)
    entries = initial(table, get_recipe("hfp8"), {1})
    assert list(entries) == [info.key for info in table.paper_tensors]
    assert {info.group for info in table.paper_tensors if entries[info.key].low} == {1}
    first = {
        role: entries[next(i.key for i in table.tensors if i.role is role and i.group == 1)] for role in PAPER_ROLES
    }
    assert first == {
        Role.ACTIVATION: Entry("fp(4,3,4)", True),
        Role.ACTIVATION_GRAD: Entry("fp(5,2,0)", True),
        Role.WEIGHT: Entry("fp(4,3,4)", True),
        Role.WEIGHT_GRAD: Entry("fp(6,9,0)", True),
    }
    assert not any(entry.low for entry in initial(table, get_recipe("hfp8")).values())


def test_initial_knows_the_operators_of_the_loss() -> None:
    rows = Rows()
    x = rows.same("log_softmax", rows.input(4))
    entries = initial(rows.table(), get_recipe("native"), {0})
    assert entries[x] == entries[f"{x}.grad"] == Entry("bf16", True)


def test_copies_are_saved_narrower_where_that_takes_fewer_bytes() -> None:
    shapes = {
        "a": ((64, 8), "relu"),
        "small": ((2, 4), "relu"),
        "mask": ((64, 8), "add"),
        "loss": ((64, 8), "log_softmax"),
    }
    rows = []
    for key, (shape, op) in shapes.items():
        for name, role in ((key, Role.ACTIVATION), (f"{key}.saved", Role.SAVED)):
            rows.append(TensorInfo(key=name, role=role, shape=shape, elements=1, dtype="float32", op=op))
    table = TensorTable(tensors=tuple(rows))

    def saved(own: str, name: str, keep: frozenset[str] = frozenset()) -> dict[str, str]:
        entries = {key: Entry(own, False) for key in shapes}
        return {key: entry.format for key, entry in save(table, entries, name, keep=keep).items()}

    both = {"a.saved": "int4:block64", "mask.saved": "int4:block64"}
    assert saved("fp32", "Int4:Block64") == both  # 8 elements are 32 bytes, a block 36
    assert saved("fp32", "int4:block64", frozenset({"mask"})) == {"a.saved": "int4:block64"}
    assert saved("e4m3:pow2", "int4:block64") == both
    assert saved("e4m3:pow2", "mxfp8") == saved("e4m3", "e4m3:block64") == saved("bf16", "fp32") == {}
    assert saved("bf16", "e4m3:pow2").keys() == {"a.saved", "mask.saved", "small.saved"}
    with pytest.raises(FormatError, match="is not a number format"):
        saved("fp32", "int5")
