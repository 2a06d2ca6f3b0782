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
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON too; - is standard output.")
]
Strategy = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(METHODS)}. milp minimizes the measured noise; optuna is 'assign tune'; standalone, with the "
        "recipe bf16 or fp16, has everything in 16 bits, masters too."
    ),
]
NoiseFile = Annotated[
    Path | None, typer.Option("--noise", metavar="FILE", help="What 'assign noise' found; measured if left out.")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="PLAN", help="A plan's file; without one: plain fp32.")
]
BackendName = Annotated[Backend, typer.Option(help="eager: no compiler, exact memory. inductor: compiled, fast.")]
PlanRounding = Annotated[
    UpdateRounding | None,
    typer.Option("--update-rounding", help="How updates of 16-bit masters are rounded; as in the plan if left out."),
]
Weights = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="fp32 weights: what 'train --checkpoint' wrote, or a saved state_dict."),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where the plan goes; - is standard output.")]
