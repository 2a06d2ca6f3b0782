"""Groups: the paper's accounting on two CIFAR models, then the rule's corners on tables by hand."""

import dataclasses

from contracts import Rows, chain, resnet18, squeezenet

from assign.plan.grouping import assign_groups
from assign.plan.keys import grad_key
from assign.plan.ops import GROUP_STARTS
from assign.plan.table import Role, TensorInfo


def row(key: str, role: Role = Role.ACTIVATION, op: str = "relu", **more: object) -> TensorInfo:
    return TensorInfo(key=key, role=role, shape=(2,), elements=2, dtype="float32", op=op, **more)


def groups(*rows: TensorInfo) -> dict[str, int]:
    return {info.key: info.group for info in assign_groups(rows)}


def parameters(table: object) -> int:
    return sum(info.elements for info in table.tensors if info.role is Role.WEIGHT)


def test_resnet18_is_the_papers() -> None:
    # Sizes by group from a run of the authors' own accounting.
    table = resnet18()
    assert parameters(table) == 11173962
    assert table.elements == 543364500
    assert [group.id for group in table.groups] == list(range(22))
    assert [group.elements for group in table.groups] == [
        789888, 50405632, 50405632, 67182848, 50405632, 67272960, 25461248, 16777728, 33849856, 25461248, 34210304,
        13763584, 8389632, 17957888, 13763584, 19399680, 11012096, 4196352, 13109248, 11012096, 8531988, 5376,
    ]  # fmt: skip
    assert table.groups[1].elements == 6 * 8388608 + 2 * (128 + 36864)


def test_squeezenet_is_the_papers() -> None:
    table = squeezenet()
    assert parameters(table) == 734986
    assert (len(table.groups), table.elements) == (27, 356459284)


def test_product_and_what_follows_share_a_group_with_the_next_products_weight() -> None:
    rows = Rows()
    x = rows.input(4)
    y = rows.op("linear", (4,), x, name="a", weights=((4, 4), (4,)))
    z = rows.same("relu", y)
    w = rows.op("linear", (4,), z, name="b", weights=((4, 4),))
    found = {info.key: info.group for info in rows.table().tensors}
    assert (found[x], found["a/linear.0"], found["a/linear.1"]) == (0, 0, 0)
    assert (found[y], found[z], found["b/linear.0"]) == (1, 1, 1)
    assert found[w] == 2
    assert all(found[key] == found[grad_key(key)] for key in rows.shapes)


def test_weight_goes_by_its_first_readers_first_activation() -> None:
    found = groups(
        row("x", op="input"),
        row("w", Role.WEIGHT, "parameter", consumers=("y", "z")),
        row("y", op="linear", inputs=("w", "x")),
        row("z", op="linear", inputs=("y", "w")),
    )
    assert found == {"x": 0, "w": 0, "y": 1, "z": 2}


def test_reader_without_activations_keeps_its_weight() -> None:
    # Token numbers are no floating-point tensor: an embedding reads its table alone.
    found = groups(
        row("x", op="linear"),
        row("table", Role.WEIGHT, "parameter", consumers=("e",)),
        row("e", op="embedding", inputs=("table",)),
        row("y", op="linear", inputs=("e",)),
    )
    assert found == {"x": 0, "table": 0, "e": 0, "y": 1}
    found = groups(
        row("x", op="input"),
        row("g", Role.WEIGHT, "parameter", consumers=("w",)),
        row("y", op="linear", inputs=("x",)),
        row("w", op="mul", inputs=("g",)),
    )
    assert found["g"] == found["w"] == 1


def test_first_group_is_0_without_inputs() -> None:
    assert groups(row("e", op="embedding"), row("y", op="linear")) == {"e": 0, "y": 1}
    assert groups(row("y", op="conv2d"), row("z", op="conv2d")) == {"y": 0, "z": 1}
    assert groups() == {}


def test_every_input_and_every_product_starts_a_group() -> None:
    assert groups(row("a", op="input"), row("b", op="input"), row("c", op="add")) == {"a": 0, "b": 1, "c": 1}
    assert {"scaled_dot_product_attention", "lstm", "bmm", "conv_transpose2d", "einsum"} <= GROUP_STARTS
    for op in GROUP_STARTS:
        assert groups(row("a", op="input"), row("b", op=op)) == {"a": 0, "b": 1}
    assert groups(row("a", op="input"), row("b", op="batch_norm")) == {"a": 0, "b": 0}


def test_other_rows_follow_their_tensor_even_in_modules_with_odd_names() -> None:
    weight = "model.optim.grad.weight"
    found = groups(
        row("x", op="input"),
        row("y", op="linear", inputs=("x",)),
        row(weight, Role.WEIGHT, "parameter", consumers=("z.master",)),
        row(grad_key(weight), Role.WEIGHT_GRAD, "parameter"),
        row(f"{weight}.master", Role.MASTER, "parameter"),
        row(f"{weight}.optim.exp_avg", Role.OPTIM_STATE, "parameter"),
        row("y.saved", Role.SAVED),
        row("y.grad", Role.ACTIVATION_GRAD),
        row("z.master", op="linear", inputs=("y", weight)),
    )
    assert found.pop("x") == 0
    assert found.pop("z.master") == 2
    assert set(found.values()) == {1}
    assert row("z.master").parts.name == "z.master"


def test_unread_weight_is_in_group_0() -> None:
    assert groups(row("x", op="input"), row("y", op="linear"), row("w", Role.WEIGHT, "parameter"))["w"] == 0


def test_grouping_changes_nothing_else_and_twice_is_once() -> None:
    table = chain(4, 8, 8)
    ungrouped = tuple(dataclasses.replace(info, group=99) for info in table.tensors)
    assert assign_groups(ungrouped) == table.tensors
