"""Handmade invalid files: each is a valid file with one invalid value, and the reader must refuse it."""

import json
from collections.abc import Iterator
from typing import Any

MISSING = object()
RAW = "<raw>"

Place = tuple[str | int, ...]

PLAN: list[tuple[Place, Any]] = [
    (("assign_plan",), 2),
    (("assign_plan",), True),
    (("assign_plan",), "1"),
    (("recipe",), MISSING),
    (("recipe",), 5),
    (("fingerprint",), None),
    (("tensors",), []),
    (("tensors",), MISSING),
    (("tensors", "0.weight", "format"), "bf17"),
    (("tensors", "0.weight", "format"), ""),
    (("tensors", "0.weight", "format"), None),
    (("tensors", "0.weight", "format"), "int4:block64"),
    (("tensors", "0.weight", "format"), "fp(99,99,99)"),
    (("tensors", "0.weight", "low"), 1),
    (("tensors", "0.weight", "low"), "yes"),
    (("tensors", "0.weight", "lowered"), True),
    (("tensors", "0.weight"), "bf16"),
    (("loaded",), {"0.weight": "e4m3"}),
    (("loaded",), {"0.weight": 16}),
    (("provenance", "seed"), "one"),
    (("provenance", "seed"), 0.5),
    (("provenance", "versions"), {"torch": 2}),
    (("provenance", "estimate"), {"peak_bytes": "many"}),
    (("provenance", "estimate"), {"peak_bytes": -1}),
    (("provenance", "estimate"), {"peak_bytes": 1.5}),
    (("provenance", "estimate"), {"noise": "low"}),
    (("provenance", "estimate"), {"low_ratio": True}),
    (("step",), {"micro_batches": 0}),
    (("step",), {"micro_batches": 1e3}),
    (("step",), {"reduction": "some"}),
    (("step",), {"parts": 4}),
    (("comment",), "hello"),
]
NOISE: list[tuple[Place, Any]] = [
    (("assign_noise",), 3),
    (("method",), "guessed"),
    (("warm_up",), -1),
    (("seed",), 1.5),
    (("loss_scaling",), "no"),
    (("fingerprint",), 0),
    (("cells", "0.weight", "bf16", 0, 0), -1e-3),
    (("cells", "0.weight", "bf16", 0, 0), "small"),
    (("cells", "0.weight", "bf16", 0, 1), 1.5),
    (("cells", "0.weight", "bf16", 0, 1), None),
    (("cells", "0.weight", "bf16", 0), [0.5]),
    (("cells", "0.weight", "bf16"), []),
    (("cells", "0.weight", "bf17"), [[0.0, 1.0, 0.0]]),
    (("cells", "0.weight", "BF16"), [[0.0, 1.0, 0.0]]),
    (("cells",), []),
]
TABLE: list[tuple[Place, Any]] = [
    (("fingerprint",), "0123456789abcdef"),
    (("tensors", 0, "elements"), -5),
    (("tensors", 0, "elements"), "many"),
    (("tensors", 0, "elements"), 2**60),
    (("tensors", 0, "shape"), [-1, 4]),
    (("tensors", 0, "role"), "hero"),
    (("tensors", 0, "need"), "rest"),
    (("tensors", 0, "dtype"), "float33"),
    (("tensors", 0, "reads"), ["float33"]),
    (("tensors", 0, "key"), "0.weight"),
    (("tensors", 0, "group"), -1),
    (("tensors", 0, "mood"), "good"),
    (("schedule",), MISSING),
    (("schedule", "kept"), [10**6]),
    (("schedule", "parameter_bytes"), -1),
    (("schedule", "events", 0, "reads"), [99999]),
    (("schedule", "events", 0, "reads"), [0]),
    (("schedule", "events", -1, "writes"), [0]),
    (("schedule", "events", 0, "writes"), [0, 0]),
    (("schedule", "micro_batches"), 0),
    (("schedule", "events", 0, "scratch"), [1, 2, 3, 4, 5, 6]),
    (("schedule", "buffers", 0, "dtype"), "text"),
    (("schedule", "buffers", 0, "elements"), 0.5),
]
RUN: list[tuple[Place, Any]] = [
    (("metrics",), MISSING),
    (("metrics",), {"accuracy": "high"}),
    (("measured_peak_bytes",), -1),
    (("step_seconds",), -0.5),
    (("promote_threshold",), 2),
    (("diverged",), 1),
    (("epochs", 0, "loss"), "low"),
    (("epochs", 0, "loss_scale"), -2.0),
    (("course", "step"), [1]),
    (("course", "overflow"), [2.0]),
    (("fingerprint",), "0123456789abcdef"),
]
COMPARISON: list[tuple[Place, Any]] = [
    (("assign_comparison",), 2),
    (("seeds",), [0, 0, 1]),
    (("seeds",), [0]),
    (("runs", 1, "seed"), 0),
    (("runs", 0, "variant"), "other"),
    (("runs", 0, "low_ratio"), 1.5),
    (("runs", 0, "result", "diverged"), MISSING),
    (("variants", 0, "name"), "low"),
    (("variants", 0, "name"), ""),
    (("variants", 0, "promote_every"), -1),
    (("epochs",), 0),
    (("elements",), -1),
    (("mood",), "good"),
]
ALL = {"plan": PLAN, "noise": NOISE, "table": TABLE, "run": RUN, "comparison": COMPARISON}

NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "1e308", "9" * 5000, str(2**70), "[" * 5000, '{"a": 1, "a": 2}')
"""Texts that replace a number in a valid file; some are not JSON."""


def nonsense(name: str, whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (description, content) of each invalid file of a kind, made from a valid one."""
    for place, value in ALL[name]:
        data = json.loads(whole)
        holder = data
        for part in place[:-1]:
            holder = holder[part]
        if value is MISSING:
            del holder[place[-1]]
        else:
            holder[place[-1]] = value
        yield f"{name}: {place} = {value!r}", json.dumps(data).encode()
    for number in NUMBERS:
        data = {RAW: 0, **json.loads(whole)}
        yield f"{name}: {number[:20]}", json.dumps(data).replace(f'"{RAW}": 0', f'"{RAW}": {number}').encode()
    yield f"{name}: twice", whole[:-1] + b"," + whole[1:]
    yield f"{name}: half a character", whole[:-1] + b', "a": "\\ud800"}'
    yield f"{name}: another coding", whole.decode().encode("utf-16")
    yield f"{name}: empty", b""
