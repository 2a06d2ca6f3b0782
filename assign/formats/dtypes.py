"""The table of facts about torch's dtypes, by name. This module does not import torch."""

from collections.abc import Mapping
from types import MappingProxyType

FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = "float64", "float32", "bfloat16", "float16"

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "complex128": 16, "complex64": 8, FLOAT64: 8, FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2,
        "float8_e5m2": 1, "float8_e4m3fn": 1, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    }
)  # fmt: skip
"""Bytes of one element of each dtype that a step may hold."""

FORMAT_NAMES: Mapping[str, str] = MappingProxyType(
    {FLOAT64: "fp64", FLOAT32: "fp32", BFLOAT16: "bf16", FLOAT16: "fp16"}
)
"""Dtype in which models are loaded and operators compute → name of the format with exactly its values."""

NARROW = (BFLOAT16, FLOAT16)
"""The dtypes of 16 bits."""
