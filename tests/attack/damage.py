"""Random damage to files, reproducible from a seed: changed bytes, and for JSON, values of wrong types."""

import copy
import json
import random
from collections.abc import Callable
from typing import Any

RAW = {
    "not a number": "NaN",
    "infinity": "-Infinity",
    "too large": "1e999",
    "nearly too large": "1e308",
    "many digits": "9" * 6000,
    "large": str(2**64),
    "deep": "[" * 3000 + "]" * 3000,
    "deep objects": '{"a":' * 500 + "1" + "}" * 500,
    "half a character": '"\\ud800"',
    "control": '"\\u001b[2J\\u0000\\u202e"',
    "twice": '{"a": 1, "a": 2}',
}
"""JSON that Python's own ``json.dumps`` does not write."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1.5, -1e-300, 2**53, -(2**31), 1e30),
    *("", "0", "-1", "fp32", "bf16", "e4m3", "int4:block64", "fp(9,9,9)", "fp(4,3,4)", "nonsense", "[/]", "x" * 5000),
    *(
        "[link=file:///etc/passwd]a[/link]",
        "ключ/слой",
        "日本/relu",
        "a\nb",
        "$\\frac{$",
        "%{x}<b>",
        "weight",
        "float32",
    ),
    *([], {}, [1, 2], ["a"], {"a": 1}, [None], [[]], [0.5, 2.0, 0.0]),
)

Change = Callable[[bytes, random.Random], bytes]


def _flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def _drop(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.choice((1, 2, 16, 200)) :]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[: start + draw.choice((1, 8, 100))] + content[start:]


def _insert(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    piece = draw.choice(
        (b"\0", b"\x1b[31m", b"\xff\xfe", "\u202e\u2028".encode(), draw.randbytes(8), b"[/]", b'"', b"{")
    )
    return content[:place] + piece + content[place:]


BYTES: tuple[Change, ...] = (_flip, _cut, _drop, _repeat, _insert)


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """Return the content with one random change to its bytes."""
    return draw.choice(BYTES)(content, draw) if content else draw.randbytes(8)


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """Return JSON content with one to three values changed, removed, added or moved."""
    data = json.loads(content)
    raw: dict[str, str] = {}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = change_value(data, draw, raw)
    text = json.dumps(data, ensure_ascii=draw.random() < 0.5)
    for name, written in raw.items():
        text = text.replace(json.dumps(name), written)
    return text.encode("utf-8", "surrogatepass")


def change_value(data: Any, draw: random.Random, raw: dict[str, str]) -> Any:
    """Return data with one value changed. Text that ``json.dumps`` cannot write is put into ``raw`` under a name."""
    places = [*_places(data)]
    if not places:
        return draw.choice(VALUES)
    holder, key = draw.choice(places)
    kind = draw.randrange(7)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(draw.choice(VALUES))[:100]] = holder[key] if draw.random() < 0.5 else draw.choice(VALUES)
    elif kind == 2:
        other, place = draw.choice(places)
        if (isinstance(other, dict) and place in other) or (isinstance(other, list) and place < len(other)):
            holder[key] = copy.deepcopy(other[place])
    elif kind == 3:
        name = f"<raw {draw.randrange(10**9)}>"
        holder[key], raw[name] = name, draw.choice([*RAW.values()])
    elif kind == 4 and isinstance(holder[key], (int, float)):
        holder[key] = draw.choice((-1, 0, 0.1, 2**40, 1e200, "1", [1]))
    elif kind == 5 and isinstance(holder, dict):
        holder[draw.choice(("", "key", "ключ", f"{key} ", str(key).upper()))] = holder.pop(key)
    else:
        holder[key] = draw.choice(VALUES)
    return data


def _places(data: Any) -> list[tuple[Any, Any]]:
    """Return a (container, key or index) pair for each value in nested lists and dicts; at most about 5,000."""
    found, waiting = [], [data]
    while waiting and len(found) < 5000:
        holder = waiting.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, value in items:
            found.append((holder, key))
            waiting.append(value)
    return found
