"""What Inductor writes for a GPU, on a machine that has none: `python tests/triton_on_cpu.py interpret | compile`.

Inductor is told to write Triton for tensors of the CPU, and :mod:`assign` that it does. Then either the interpreter of
Triton runs the kernels, and the checks of ``benchmarks/device_checks.py`` compare their results with plain torch's; or
Triton compiles them for an H100, and the names of the instructions are looked at. What the interpreter leaves to a
library of GPUs, or does inexactly (conversions of floats) or slowly, element by element, torch or NumPy does here.
"""

import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = str(int(sys.argv[1:] == ["interpret"]))  # before triton is imported

import numpy as np
import torch
import torch._inductor.config as inductor_config
import triton
import triton.language as tl
from torch._dynamo.device_interface import CpuInterface
from torch._inductor.runtime import triton_compat, triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter

sys.path.insert(0, str(Path(__file__).parents[1]))

from assign import _torch
from assign.numerics.blocks import decode_blocks, encode_blocks
from assign.numerics.dispatch import use_compiled
from assign.numerics.rounding import amax_scale, decode, encode, quantize
from benchmarks import device_checks

H100 = GPUTarget("cuda", 90, 32)
CPU = torch.device("cpu")
FORMATS = ("e4m3", "e5m2:pow2", "e4m3:amax", "fp(8,7,0)", "posit(8,2)", "posit(16,1):underflow")
SAVED = ("int4:block64", "mxfp4", "e4m3:block64")


class Driver:
    """Of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return H100

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


def write_triton() -> None:
    """Inductor writes Triton for the CPU, with neither of its caches."""
    driver.set_active(Driver())
    CpuInterface.raise_if_triton_unavailable = staticmethod(lambda _device=None: None)
    triton_helpers.set_driver_to_cpu = lambda: None
    inductor_config.cpu_backend = "triton"
    inductor_config.fx_graph_cache = False
    inductor_config.compile_threads = 1
    _torch.writes_triton = lambda _device: True


# ---- the interpreter


def tensor(array: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    kind = tl.block_type(dtype, list(array.shape)) if array.ndim else dtype
    return tl.tensor(interpreter.TensorHandle(np.atleast_1d(array), dtype), kind)


def of_library(function: Callable[..., torch.Tensor], dtype: tl.dtype | None = None) -> Callable[..., tl.tensor]:
    """What a GPU's library has, by torch; ``dtype``: of the result, if not the arguments'."""

    def call(*args: tl.tensor, _semantic: Any = None) -> tl.tensor:
        found = function(*(torch.from_numpy(np.ascontiguousarray(each.handle.data)) for each in args)).numpy()
        return tensor(found if dtype is None else found.astype(np.int32), dtype or args[0].type.scalar)

    return call


def reduction(function: Callable[..., np.ndarray]) -> Callable[..., tl.tensor]:
    return lambda x, axis: tensor(function(x.handle.data, axis=int(axis)), x.type.scalar)


def convert_floats(array: np.ndarray, source: tl.dtype, target: tl.dtype, _rounding: Any) -> np.ndarray:
    names = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    raw = torch.frombuffer(bytearray(array.tobytes()), dtype=names[source.name])
    bits = raw.to(names[target.name]).view(torch.uint8).numpy()
    return bits.view(getattr(np, f"uint{target.primitive_bitwidth}")).reshape(array.shape)


def with_large_blocks(run: Callable[..., Any]) -> Callable[..., Any]:
    """As the interpreter loops over blocks in Python, let there be few, where kernels mask what is beyond the end."""

    def grown(self: CachingAutotuner, args: Any, config: triton.Config) -> Any:
        source = inspect.getsource(self.fn.fn)
        if "r0_mask = r0_index < r0_numel" in source and "R0_BLOCK" in config.kwargs:
            config.kwargs["R0_BLOCK"] = 2**14
        fixed = re.search(r"R0_BLOCK: tl.constexpr = (\d+)", source)
        width = int(fixed[1]) if fixed else config.kwargs.get("R0_BLOCK", 1)
        if "xmask = xindex < xnumel" in source and "YBLOCK" not in config.kwargs:
            config.kwargs["XBLOCK"] = 2**18 // width
        return run(self, args, config)

    return grown


def interpret() -> None:
    """Checks of rounding, coding, chance and blocks, in some formats: prints one line each, or raises."""
    np.seterr(all="ignore")
    interpreter._convert_float = convert_floats
    for name, function in {"floor": torch.floor, "nearbyint": torch.round, "copysign": torch.copysign}.items():
        setattr(triton_compat.libdevice, name, of_library(function))
    for name, function in {"isnan": torch.isnan, "isinf": torch.isinf, "signbit": torch.signbit}.items():
        setattr(triton_compat.libdevice, name, of_library(function, tl.int32))
    triton_helpers.max2, triton_helpers.min2 = reduction(np.max), reduction(np.min)
    CachingAutotuner._interpret_args_grid = with_large_blocks(CachingAutotuner._interpret_args_grid)
    device_checks.NAMES = FORMATS
    device_checks.SAVED_FORMATS = SAVED
    for check in (device_checks.check_rounding, device_checks.check_chance, device_checks.check_blocks):
        print(check(CPU, True), flush=True)


# ---- the compiler


def compile_kernels() -> None:
    """Prints the float instructions of each kernel that may round otherwise than the CPU does: there should be none."""
    found: list[str] = []

    def compile_only(self: CachingAutotuner, *_args: Any, **_kwargs: Any) -> None:
        meta = self._create_compile_meta(self.configs[0])
        source = triton_compat.ASTSource(self.fn, meta["signature"], meta["constants"], meta["configs"][0])
        binary = triton.compile(source, target=H100, options=self._create_compile_options(self.configs[0], meta))
        found.append(binary.asm["ptx"])

    CachingAutotuner.precompile = lambda *_args, **_kwargs: None
    CachingAutotuner.run = compile_only
    x, scale, seed = torch.randn(4096), torch.tensor(0.3), torch.tensor(3)
    with use_compiled(True):
        for name in FORMATS:
            scaled = {"scale": scale} if name.endswith(("pow2", "amax")) else {}
            for dtype in (torch.float32, torch.bfloat16):
                quantize(x.to(dtype), name, **scaled)
            decode(encode(x, name, **scaled), name, **scaled)
            if scaled:
                amax_scale(x, name)
        quantize(x, "e4m3:sr", seed=seed)
        for name in (*SAVED, "mxfp4:sr"):
            decode_blocks(encode_blocks(x, name, seed=seed), name, x)
    inexact = re.findall(r"\b(?:fma\.\S+|div\.(?:full|approx)\S*|rcp\.approx\S*)", "\n".join(found))
    print(f"{len(found)} kernels; not as on a CPU: {sorted(set(inexact))}")


if __name__ == "__main__":
    write_triton()
    {"interpret": interpret, "compile": compile_kernels}[sys.argv[1]]()
