"""A slice of the zoo: library models with the model's own loss, under plans, in a process of their own."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import bench_zoo
from benchmarks.zoo import sizes
from benchmarks.zoo.build import LIBRARIES, names

WORKER = Path(__file__).parents[2] / "benchmarks" / "zoo" / "try_model.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("transformers", "LlamaForCausalLM"),
        ("transformers", "M2M100ForConditionalGeneration"),
        ("transformers", "LlavaForConditionalGeneration"),
    ],
)
def test_a_library_model_works_under_plans(library, name):
    """The second looks at values of its batch and leaves layers out at random; the third puts images between words."""
    known = next(each for each in names([library]) if each.name == name)
    command = [sys.executable, str(WORKER), *known]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    row = json.loads(ended.stdout.splitlines()[-1])
    assert row["result"] == "ok", row


def test_the_list_has_each_model_once_and_all_libraries():
    found = Counter(names(list(LIBRARIES)))
    assert max(found.values()) == 1
    assert {each.package for each in found} == set(LIBRARIES)
    assert sum(each.package == "transformers" for each in found) > 500
    assert sum(each.package == "timm" for each in found) > 60


def test_a_small_configuration_keeps_a_layer_of_each_kind_and_the_parts_of_parts():
    large = {
        "num_hidden_layers": 12,
        "layer_types": ["linear"] * 3 + ["full"] + ["linear"] * 8,
        "image_token_id": 32000,
        "vision_config": {"hidden_size": 1024, "num_attention_heads": 16, "depths": [2, 2, 18, 2], "patch_size": 14},
    }
    found = sizes.small(large)
    assert found["layer_types"] == ["linear", "full"]
    assert found["num_hidden_layers"] == 2
    assert found["image_token_id"] < 128
    part = found["vision_config"]
    assert part == {"hidden_size": 32, "num_attention_heads": 2, "depths": [2, 2, 2, 2], "patch_size": 14}
    assert sizes.small(large, shallow=True)["vision_config"]["hidden_size"] == 1024


def test_models_that_fail_in_one_place_are_one_reason():
    rows = [
        {"package": "timm", "file": "a", "name": each, "result": "raw", "reason": f"ValueError (x.py:3): {each}"}
        for each in ("one", "two")
    ]
    assert "| raw | ValueError (x.py:3) | 2 |" in bench_zoo.table(rows)
