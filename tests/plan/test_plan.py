"""Assignment: what the file says, what comes back, and every way a file can be wrong."""

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assign.errors import PlanError
from assign.json_file import LARGEST
from assign.plan.persistent_state import UpdateRounding
from assign.plan.plan import Assignment, Entry, Provenance
from assign.plan.step_options import StepOptions

E4M3, E5M2, BF16, FP32 = Entry("e4m3", True), Entry("e5m2", True), Entry("bf16", False), Entry("fp32", False)

FORMAT_NAMES = st.sampled_from(
    ["fp32", "bf16", "fp16", "e4m3", "e5m2:pow2", "fp(4,3,4)", "fp(6,9,0)", "bf16:sr", "fp(4,3,4):sr"]
)
NUMBERS = st.integers(-(2**60), 2**60) | st.floats(-LARGEST, LARGEST)
ASSIGNMENTS = st.builds(
    Assignment,
    entries=st.dictionaries(st.text(), st.builds(Entry, FORMAT_NAMES, st.booleans())),
    recipe=st.text(),
    fingerprint=st.text(),
    provenance=st.builds(
        Provenance,
        command=st.text(),
        versions=st.dictionaries(st.text(), st.text()),
        seed=st.none() | st.integers(-(2**63), 2**63),
        strategy=st.text(),
        estimate=st.dictionaries(st.text(), NUMBERS | st.text() | st.none() | st.lists(NUMBERS)),
        created=st.text(),
    ),
)


def plan(**entries: Entry) -> Assignment:
    return Assignment(entries=entries or {"a": E4M3, "b": BF16}, recipe="native", fingerprint="f00d")


def file_of(**changes: object) -> str:
    return json.dumps(json.loads(plan().to_json()) | changes)


def refusal(text: str) -> str:
    with pytest.raises(PlanError) as caught:
        Assignment.from_json(text, where="plan.json")
    message = str(caught.value)
    assert message.startswith("plan.json")
    return message


@given(ASSIGNMENTS)
def test_json_round_trip(assignment: Assignment) -> None:
    again = Assignment.from_json(assignment.to_json())
    assert again == assignment
    assert list(again.entries) == list(assignment.entries)
    assert again.to_json() == assignment.to_json()


def test_a_plan_keeps_how_updates_are_rounded() -> None:
    kahan = plan().with_update_rounding("kahan")
    again = Assignment.from_json(kahan.to_json())
    assert again == kahan != plan()
    assert again.update_rounding is UpdateRounding.KAHAN
    assert "update_rounding" not in plan().to_json()  # files of older versions have none: nearest
    assert plan().diff(kahan).update_rounding == ("nearest", "kahan")
    assert plan().diff(plan()).update_rounding is None
    assert kahan.with_update_rounding(None) is kahan
    assert "update_rounding" in refusal(file_of(update_rounding="khan"))
    with pytest.raises(PlanError, match="did you mean 'kahan'"):
        plan().with_update_rounding("khan")


def test_file_is_one_line_per_tensor(tmp_path: Path) -> None:
    provenance = Provenance(command="assign search", versions={"torch": "2"}, seed=1, estimate={"peak_bytes": 5})
    text = plan().with_provenance(provenance).to_json()
    assert json.loads(text) == {
        "assign_plan": 1,
        "recipe": "native",
        "fingerprint": "f00d",
        "provenance": {
            "command": "assign search",
            "versions": {"torch": "2"},
            "seed": 1,
            "strategy": "",
            "estimate": {"peak_bytes": 5},
            "created": "",
        },
        "tensors": {"a": {"format": "e4m3", "low": True}, "b": {"format": "bf16", "low": False}},
    }
    assert '    "a": {"format": "e4m3", "low": true},\n    "b": {"format": "bf16", "low": false}\n  }\n}\n' in text


def test_provenance_may_be_left_out() -> None:
    data = json.loads(file_of())
    del data["provenance"]
    assert Assignment.from_json(json.dumps(data)) == plan()


def test_schema_describes_the_file() -> None:
    schema = Assignment.schema()
    assert schema["type"] == "object"
    assert schema["title"] == "assign plan"
    optional = ["loaded", "provenance", "step", "update_rounding"]
    assert sorted(schema["properties"]) == sorted([*schema["required"], *optional])
    assert sorted(schema["required"]) == ["assign_plan", "fingerprint", "recipe", "tensors"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["assign_plan"]["const"] == 1
    assert schema["properties"]["tensors"]["additionalProperties"] == {"$ref": "#/$defs/Entry"}
    assert sorted(schema["$defs"]["Entry"]["properties"]) == ["format", "low"]
    json.dumps(schema)


def test_formats_by_key() -> None:
    assignment = plan(**{"x/relu": E4M3, "y/relu": E4M3, "y/relu.saved": E5M2})
    assert assignment.format_of("x/relu").name == "e4m3"
    assert assignment.saved_format("x/relu").name == "e4m3"
    assert assignment.saved_format("y/relu").name == "e5m2"
    with pytest.raises(PlanError, match=r"no entry for 'x/rel' among its 3\. Nearest: 'x/relu'"):
        assignment.format_of("x/rel")
    with pytest.raises(PlanError, match="no entry for 'z'"):
        assignment.saved_format("z")


def test_format_names_are_canonical() -> None:
    assert plan(a=Entry("FP(4, 3, 4)", True)).entries["a"] == Entry("fp(4,3,4)", True)


def test_unknown_format_is_refused_at_once() -> None:
    with pytest.raises(PlanError, match=r"'a' is assigned the format 'e4m33'.*'e4m3'"):
        plan(a=Entry("e4m33", True))


def test_saved_copies_have_formats_of_their_own() -> None:
    same = plan(**{"a": Entry("e4m3:sr", True), "a.saved": Entry("e4m3:sr", True)})
    assert same.saved_format("a").stochastic
    other = plan(**{"a": Entry("bf16", True), "a.saved": Entry("E5M2 :SR", True)})
    assert other.saved_format("a").name == "e5m2:sr"
    blocks = plan(**{"a": Entry("bf16", True), "a.saved": Entry(" Int4 : Block64", False)})
    assert blocks.entries["a.saved"].format == "int4:block64"
    assert blocks.saved_format("a").bits_per_element == 4.5
    assert Assignment.from_json(blocks.to_json()) == blocks
    with pytest.raises(
        PlanError, match=r"'a\.saved' is assigned the format 'int5:block64'(.|\n)*For saved activations also"
    ):
        plan(**{"a": Entry("bf16", True), "a.saved": Entry("int5:block64", False)})


@pytest.mark.parametrize("key", ["a", "a.grad", "w.master", "w.grad.stored", "w.optim.exp_avg"])
@pytest.mark.parametrize("name", ["mxfp4", "int4:block64:sr"])
def test_blocks_of_saved_copies_are_for_nothing_else(key: str, name: str) -> None:
    match = rf"'{key}' is assigned the format '{name}': .*is allowed only for saved activations"
    with pytest.raises(PlanError, match=match):
        plan(**{"a": BF16, "w": BF16, key: Entry(name, False)})


def test_replace_leaves_the_original() -> None:
    before = plan()
    after = before.replace({"b": E5M2, "c": FP32})
    assert after.entries == {"a": E4M3, "b": E5M2, "c": FP32}
    assert before == plan()
    assert (after.recipe, after.fingerprint) == ("native", "f00d")


def test_entries_are_a_copy() -> None:
    entries = {"a": E4M3}
    assignment = plan(**entries)
    own = Assignment(entries=entries, recipe="native", fingerprint="f00d")
    entries["b"] = BF16
    assert own == assignment
    assert pickle.loads(pickle.dumps(own)) == own


def test_diff() -> None:
    diff = plan(a=E4M3, b=BF16, c=FP32).diff(plan(a=E4M3, b=E5M2, d=FP32))
    assert (diff.only_here, diff.only_there, diff.changed) == (("c",), ("d",), {"b": (BF16, E5M2)})
    assert diff
    assert not plan().diff(plan())
    assert plan(a=BF16).diff(plan(a=Entry("bf16", True))).changed  # the decision counts, not the bits alone


@given(ASSIGNMENTS, ASSIGNMENTS)
def test_diff_leads_from_one_to_the_other(here: Assignment, there: Assignment) -> None:
    diff = here.diff(there)
    rebuilt = {key: entry for key, entry in here.entries.items() if key not in diff.only_here}
    rebuilt |= {key: there.entries[key] for key in diff.only_there} | {k: new for k, (_, new) in diff.changed.items()}
    assert rebuilt == there.entries
    assert bool(diff) == (here.entries != there.entries)


def test_check_covers_accepts_what_belongs_to_a_tensor() -> None:
    extra = {"a.saved": E5M2, "w": BF16, "w.master": FP32, "w.optim.exp_avg": FP32}
    plan(a=E4M3, **extra).check_covers(["a", "w"], where="plan.json")
    with pytest.raises(PlanError, match=r"entries for 1 tensors that the model does not have:\n    'z\.saved'"):
        plan(**{"a": E4M3, "z.saved": E5M2}).check_covers(["a"], where="plan.json")


def test_check_covers_names_the_nearest_keys() -> None:
    names = ["stem/relu", "head/linear", "body/add", "tail/sigmoid", "neck/matmul"]
    entries = {name.replace("/", ".0/"): E4M3 for name in names}
    with pytest.raises(PlanError) as caught:
        plan(**entries).check_covers(names, where="old.json")
    assert str(caught.value).splitlines() == [
        "old.json does not fit this model.",
        "  It has no entry for 5 of the model's 5 tensors:",
        "    'stem/relu' (nearest in the plan: 'stem.0/relu')",
        "    'head/linear' (nearest in the plan: 'head.0/linear')",
        "    'body/add' (nearest in the plan: 'body.0/add')",
        "    and 2 more",
        "  It has entries for 5 tensors that the model does not have:",
        "    'stem.0/relu' (nearest in the model: 'stem/relu')",
        "    'head.0/linear' (nearest in the model: 'head/linear')",
        "    'body.0/add' (nearest in the model: 'body/add')",
        "    and 2 more",
        "  Use the plan with the model it was made for, or search a plan for this model.",
    ]


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    plan(c=FP32).save(str(path))
    assert Assignment.load(path) == plan(c=FP32)
    assert os.listdir(tmp_path) == ["plan.json"]


def test_save_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "plan.json")
    plan().save(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert Assignment.load(tmp_path / "plan.json") == plan()


def test_failed_save_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanError, match=r"cannot write the plan .*No space left"):
        plan(c=FP32).save(path)
    assert Assignment.load(path) == plan()
    assert os.listdir(tmp_path) == ["plan.json"]


def test_places_that_hold_no_plan(tmp_path: Path) -> None:
    plan().save(tmp_path / "file")
    for path in (tmp_path, tmp_path / "no" / "plan.json", tmp_path / "file" / "plan.json"):
        with pytest.raises(PlanError, match=r"[Gg]ive .* directory|give the plan's file"):
            plan().save(path)
    with pytest.raises(PlanError, match=r"there is no plan .*missing\.json"):
        Assignment.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="is a directory, not a plan"):
        Assignment.load(tmp_path)
    with pytest.raises(PlanError, match="cannot read the plan"):
        Assignment.load(tmp_path / "file" / "plan.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not text in UTF-8"):
        Assignment.load(tmp_path / "binary")
    assert sorted(os.listdir(tmp_path)) == ["binary", "file"]


def test_a_mark_at_the_beginning_is_no_harm(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan().to_json(), encoding="utf-8-sig")
    assert Assignment.load(tmp_path / "plan.json") == plan()


def test_every_cut_of_a_file_is_refused() -> None:
    text = plan().to_json().rstrip()
    for length in range(len(text)):
        assert "not JSON" in refusal(text[:length])


def test_json_that_is_no_plan() -> None:
    assert "it has a list at the top" in refusal("[1]")
    assert "it has no key 'assign_plan'" in refusal('{"a": 1}')
    assert "not a plan" in refusal("[" * 100_000)
    assert "not a plan" in refusal('{"assign_plan": 1' + "0" * 5000 + "}")


def test_other_versions() -> None:
    assert "version 2; this package reads version 1. Upgrade" in refusal(file_of(assign_plan=2))
    for version in (0, "1", None, True, 1.0):
        assert "Search again" in refusal(file_of(assign_plan=version))


def test_twice_the_same_key() -> None:
    text = plan().to_json().replace('"b":', '"a":')
    assert "has the key 'a' twice" in refusal(text)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(number: str) -> None:
    text = plan().to_json().replace('"estimate": {}', f'"estimate": {{"peak_bytes": {number}}}')
    assert f"number {number}" in refusal(text)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"tensors": {"a": {"format": "e4m3"}}}, "tensors → a → low: Field required"),
        ({"tensors": {"a": {"format": "e4m3", "low": "yes"}}}, "tensors → a → low: Input should be a valid boolean"),
        ({"tensors": {"a": {"format": 8, "low": True}}}, "tensors → a → format: Input should be a valid string"),
        ({"tensors": {"a": {"format": "e4m3", "low": True, "bits": 8}}}, "tensors → a → bits: Unexpected"),
        ({"tensors": [1]}, "tensors: Input should be an object"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"provenance": {"seed": "one"}}, "provenance → seed: Input should be a valid integer"),
    ],
)
def test_fields_that_do_not_fit(changes: dict, fact: str) -> None:
    message = refusal(file_of(**changes))
    assert fact in message
    assert "pydantic" not in message


def test_unknown_format_names_the_tensor_and_the_nearest() -> None:
    message = refusal(file_of(tensors={"a": {"format": "bf16", "low": False}, "b": {"format": "e4m33", "low": True}}))
    assert message.startswith("plan.json: 'b' is assigned the format 'e4m33'")
    assert "'e4m3'" in message


@pytest.mark.parametrize(
    "step",
    [
        {"micro_batches": 0},
        {"micro_batches": "4"},
        {"micro_batches": True},
        {"micro_batches": 4.5},
        {"micro_batches": 2**40},
        {"micro_batches": 4, "reduction": "average"},
        {"micro_batches": 4, "part_statistics": 1},
        {"micro_batches": 4, "more": 1},
        4,
        None,
    ],
)
def test_a_step_that_makes_no_sense_is_refused(step: object) -> None:
    text = plan().to_json().replace('"tensors":', f'"step": {json.dumps(step)},\n  "tensors":', 1)
    with pytest.raises(PlanError):
        Assignment.from_json(text)


def test_a_step_is_written_only_if_it_differs_from_plain_torch() -> None:
    assert '"step"' not in plan().to_json()
    step = StepOptions(micro_batches=4, reduction="sum", part_statistics=True)
    text = plan().with_step(step).to_json()
    assert json.loads(text)["step"] == {"micro_batches": 4, "reduction": "sum", "part_statistics": True}
    assert Assignment.from_json(text).step == step
