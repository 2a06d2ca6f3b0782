"""Samples of PyTorch's databases that do not come out as demanded under a plan, each with its reason. No torch."""

from collections.abc import Mapping
from typing import Any

POLE = "the operator itself is not finite on parameters rounded to bf16: they meet its pole"
SINGULAR = "made to be singular: rounded to bf16, the product of low rank has full rank, and its inverse is of noise"
INFINITE = "a parameter is -inf, which saturates at the largest number of bf16, as everywhere in a plan"
UNROLLED = "AOTAutograd unrolls the layer, where plain PyTorch has oneDNN's, and sums in another order: 3e-7"

EXCEPTIONS: Mapping[str, str] = {
    "asin": POLE,
    "atanh": POLE,
    "erfinv": POLE,
    "linalg.pinv.singular": SINGULAR,
    "torch.ops.aten._safe_softmax.default": INFINITE,
    "nn.LSTM": UNROLLED,
}
"""Name in its database → why a sample of it may differ."""


def is_good(row: Mapping[str, Any]) -> bool:
    """Whether a sample came out as demanded under both plans."""
    return row["fp32"] in ("eager", "aot_eager") and row["bf16"] == "ok"


def reason(row: Mapping[str, Any]) -> str:
    """Why a sample differs; empty where nobody knows, as of whatever a plan refuses or raises at."""
    refused = any(str(row[plan]).startswith(("refused", "raw")) for plan in ("fp32", "bf16"))
    return "" if refused else EXCEPTIONS.get(row["name"], "")
