"""Options that several commands share: name, type and help of each."""

from pathlib import Path
from typing import Annotated

import typer

from assign.executor.backends import Backend
from assign.plan.stored import UpdateRounding
from assign.strategies.milp import Granularity

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
Seed = Annotated[int, typer.Option(help="Seed of the model, the data's order and the search.")]
BatchSize = Annotated[int | None, typer.Option(help="Samples per step; the task's own if left out.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Data = Annotated[Path | None, typer.Option(help="Directory with the task's data.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs to train; the task's own if left out.")]
Recipe = Annotated[str, typer.Option(help="Candidates per tensor: native, hfp8, bf16 or fp16.")]
Strategy = Annotated[
    str,
    typer.Option(
        help="greedy, greedy-smallest, greedy-random, uniform, operator, operator-prime; milp: least noise; optuna: "
        "short trainings; or standalone, with the recipe bf16 or fp16: everything in 16 bit, masters too."
    ),
]
OptimizerStates = Annotated[
    str | None,
    typer.Option(help="Store optimizer states as bf16, fp16, dynamic8, dynamic4 or e4m3:block256; fp32 if left out."),
]
Gradients = Annotated[
    str | None,
    typer.Option(help="Store gradients as bf16, fp16, e5m2:pow2 or e4m3:pow2; as their masters if left out."),
]
Master = Annotated[
    str | None, typer.Option(help="Store parameters as bf16, fp16, or bf16+8 for masters of 24 bits; fp32 if left out.")
]
Saved = Annotated[
    str | None,
    typer.Option(
        help="Format of saved activations, e.g. int4:block64 or mxfp8 (see 'assign formats'), where it takes fewer "
        "bytes. Default: the activation's own format. With --strategy milp, several with commas to choose from."
    ),
]
Format = Annotated[str | None, typer.Option("--format", help="With --strategy uniform: every tensor in this format.")]
Formats = Annotated[
    str,
    typer.Option(
        help="Candidates of every tensor, beside the recipe's, or (--strategy milp) in their place: names with commas, "
        "the widest first; e4m3:pow2/e5m2:pow2 means the first for values, the second for gradients."
    ),
]
NoiseFile = Annotated[
    Path | None, typer.Option("--noise", metavar="FILE", help="What 'assign noise' found; measured if left out.")
]
Trials = Annotated[
    int | None, typer.Option(help="With --strategy optuna: trainings of the whole study; 32 if left out.")
]
Workers = Annotated[int | None, typer.Option(help="With --strategy optuna: processes here; 1 if left out.")]
Storage = Annotated[
    str | None,
    typer.Option(
        help="With --strategy optuna: the study's database, postgresql://… for several machines; a file beside the "
        "plan if left out. The same command goes on, or joins."
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="With --strategy optuna: one of the task's metrics, or loss, of training; accuracy if left out, loss "
        "where the task does not evaluate."
    ),
]
TrialBackend = Annotated[
    Backend | None, typer.Option("--backend", help="With --strategy optuna: what trains; eager if left out.")
]
Sampler = Annotated[str | None, typer.Option(help="With --strategy optuna: tpe or nsga2.")]
Pins = Annotated[
    list[str] | None, typer.Option("--pin", help="With --strategy milp: PATTERN=FORMAT, e.g. 'head.*=bf16'; several.")
]
Shares = Annotated[Granularity, typer.Option(help="With --strategy milp: what shares a decision.")]
LowRatio = Annotated[float | None, typer.Option(help="Share of the elements to hold low, 0 to 1.")]
Budget = Annotated[
    str | None, typer.Option(help="Peak bytes of a step: 512MiB, 6GB, or 50% of the peak without a plan.")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", metavar="PLAN", help="A plan's file; without one: plain fp32.")
]
BackendName = Annotated[Backend, typer.Option(help="eager: no compiler, exact memory. inductor: compiled, fast.")]
PromoteEvery = Annotated[
    int | None,
    typer.Option(help="Steps between two looks at what overflows; the recipe's own if left out, 0: promote nothing."),
]
PromoteThreshold = Annotated[float, typer.Option(help="Share of overflowing elements at which a tensor is promoted.")]
Rounding = Annotated[
    UpdateRounding, typer.Option("--update-rounding", help="How updates of 16-bit masters are rounded.")
]
PlanRounding = Annotated[
    UpdateRounding | None,
    typer.Option("--update-rounding", help="How updates of 16-bit masters are rounded; as in the plan if left out."),
]
Weights = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="fp32 weights: what 'train --checkpoint' wrote, or a saved state_dict."),
]
WarmUp = Annotated[
    int | None,
    typer.Option(min=0, help="Steps of plain training before noise is measured; 40 if left out, 0 with --checkpoint."),
]
From = Annotated[
    Path | None,
    typer.Option("--from", help="Go on from these fp32 weights: what 'train --checkpoint' wrote, or a state_dict."),
]
Output = Annotated[Path, typer.Option("-o", "--output", help="Where the plan goes; - is standard output.")]
StepTime = Annotated[
    str | None,
    typer.Option(
        "--max-step-time",
        help="With --strategy milp: what a forward and backward pass may take, operator by operator: 200ms, or 1.3x of "
        "what it takes with all tensors high.",
    ),
]
