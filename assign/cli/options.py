"""Arguments and options that several commands share: type and help of each. Groups of options are elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from assign.executor.backends import Backend
from assign.plan.persistent_state import UpdateRounding
from assign.strategies import METHODS

TaskName = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="digits, cifar10, cifar100, fashion-mnist, shakespeare, FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION",
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON; - is standard output.")
]
Strategy = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(METHODS)}. milp minimizes the measured noise; optuna is 'assign tune'; standalone keeps all "
        "tensors in 16 bits, masters too, and requires the recipe bf16 or fp16."
    ),
]
NoiseFile = Annotated[
    Path | None,
    typer.Option("--noise", metavar="FILE", help="Noise table of 'assign noise'. Default: measured if needed."),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", metavar="PLAN", help="A plan's file. Default: no plan.")]
BackendName = Annotated[Backend, typer.Option(help="eager: not compiled, exact memory. inductor: compiled, fast.")]
PlanRounding = Annotated[
    UpdateRounding | None,
    typer.Option("--update-rounding", help="How updates of 16-bit masters are rounded. Default: as in the plan."),
]
Weights = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="File of fp32 weights: of 'train --checkpoint', or a saved state_dict."),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Path of the plan; - is standard output.")]
