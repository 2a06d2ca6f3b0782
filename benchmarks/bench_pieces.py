"""Is a step in several pieces as fast as ``torch.compile`` with its graph breaks, and as small as is said?

Claim: compiled, a plan that changes nothing takes at most 1.15 times as long as ``torch.compile`` of the same loss,
which breaks its graph at the same places; the peak that ``assign.rehearse`` says is within 5 % of the measured one.

Method: models whose code reads values: a GPT whose loss is checked to be finite, a mixture of experts whose tokens go
where a router says, and Wav2Vec2 with masked time steps and layers that are left out at random. Forward and backward
pass, then AdamW. The configurations step by turns in one process, so that a machine that slows down does so for all;
the time is the median of their steps, the ratio the median of the ratios of neighbours. Peak: every byte alive at the
worst moment of a step, parameters and states included.

Assumptions: nothing else runs on the machine; one batch, again and again.

    python benchmarks/bench_pieces.py
    python benchmarks/bench_pieces.py --models gpt --turns 3
"""

import argparse
import copy
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import assign
from assign.plan.plan import Assignment
from assign.plan.space import SearchSpace
from assign.planner import search_table
from assign.tasks.models import GPT
from assign.tracing.measuring import measure_peak
from benchmarks import facts

Step = Callable[[nn.Module, Any], Tensor]
STEPS_IN_A_TURN = 3


def main() -> None:
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # Wav2Vec2 leaves out other layers in each step
    path = options.output or facts.default_path("pieces", "cpu")
    result: dict[str, Any] = {"facts": facts.gather("cpu", options.threads), "rows": []}
    print("| model | breaks | torch.compile s | plan s | ratio | bf16 plan / autocast | peak said / measured |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        row = {"model": name, **compare(*MODELS[name](), options.turns)}
        result["rows"].append(row)
        said = [row["breaks"], row["seconds"]["compile"], row["seconds"]["as loaded"], row["ratio"], row["bf16 ratio"]]
        print(f"| {name} | " + " | ".join(f"{each:.3g}" for each in (*said, row["peak ratio"])) + " |", flush=True)
        facts.write(path, result)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE_pieces_cpu_COMMIT.json")
    return parser.parse_args(arguments)


def compare(model: nn.Module, batch: Any, loss: Step, turns: int) -> dict[str, Any]:
    """Seconds and bytes of a step in several pieces, beside ``torch.compile``."""
    table = assign.trace(model, batch, loss, torch.optim.AdamW)
    plans = {
        name: search_table(table, strategy="uniform", space=SearchSpace(formats=name)) for name in ("fp32", "bf16")
    }
    trainings = {
        "compile": Training(model, torch.compile(loss), batch),
        "as loaded": Training(model, loss, batch, plans["fp32"]),
        "autocast": Training(model, autocast(torch.compile(loss)), batch),
        "bf16": Training(model, loss, batch, plans["bf16"]),
    }
    for training in trainings.values():
        for _ in range(WARM_UP):
            training.step()
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for turn in range(turns):
        for name in list(trainings)[:: 1 if turn % 2 else -1]:
            seconds[name].append(statistics.median(trainings[name].timed() for _ in range(STEPS_IN_A_TURN)))
    said = {name: assign.rehearse(model, batch, loss, plan, table).peak_bytes for name, plan in plans.items()}
    measured = {"fp32": trainings["as loaded"].peak(), "bf16": trainings["bf16"].peak()}
    return {
        "breaks": len(table.breaks),
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "ratio": median_ratio(seconds["as loaded"], seconds["compile"]),
        "bf16 ratio": median_ratio(seconds["bf16"], seconds["autocast"]),
        "said_bytes": said,
        "measured_bytes": measured,
        "peak ratio": said["fp32"] / measured["fp32"],
        "losses": {name: training.losses[WARM_UP - 1] for name, training in trainings.items()},
    }


WARM_UP = 6


class Training:
    """A copy of a model that is trained in one of the ways."""

    def __init__(self, model: nn.Module, loss: Step, batch: Any, plan: Assignment | None = None) -> None:
        self.model, self.batch = copy.deepcopy(model), batch
        plain = functools.partial(loss, self.model)
        self.loss = assign.planned_step(self.model, loss, plan) if plan else plain
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []

    def step(self) -> None:
        torch.manual_seed(len(self.losses))
        self.optimizer.zero_grad()
        loss = self.loss(self.batch)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def timed(self) -> float:
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def peak(self) -> int:
        """Bytes alive at the worst moment of a step."""
        self.optimizer.zero_grad()
        states = [v for each in self.optimizer.state.values() for v in each.values() if isinstance(v, Tensor)]
        leaves = self.batch.values() if isinstance(self.batch, dict) else self.batch
        return measure_peak(self.step, [*self.model.parameters(), *self.model.buffers(), *leaves, *states])


def autocast(loss: Step) -> Step:
    def step(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, batch)

    return step


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def checked_loss(model: nn.Module, batch: Any) -> Tensor:
    """Raises for labels that do not exist and for a loss that is not finite, as training code does."""
    if batch[1].max() >= 2048:
        raise ValueError("no such label")
    loss = F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())
    if not loss.detach().isfinite():
        raise FloatingPointError("the loss is not finite")
    return loss * 1.0


class Experts(nn.Module):
    """A layer of experts, each of which gets the tokens that a router sends to it."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, experts)
        parts = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.experts = nn.ModuleList(nn.Sequential(*copy.deepcopy(parts)) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).flatten(0, 1)
        weights, chosen = self.router(y).softmax(-1).max(-1)
        found = torch.zeros_like(y)
        for number, expert in enumerate(self.experts):
            (tokens,) = torch.where(chosen == number)
            if len(tokens):
                mine = expert(y[tokens]) * weights[tokens, None]
                found = found.index_add(0, tokens, mine.to(found.dtype))
        return x + found.view(x.shape)


def _gpt() -> tuple[nn.Module, Any, Step]:
    ids = torch.randint(2048, (8, 257))
    return GPT(symbols=2048, context=256, width=256, layers=4, heads=8), (ids[:, :-1], ids[:, 1:]), checked_loss


def _experts() -> tuple[nn.Module, Any, Step]:
    layers = [Experts(256, 4) for _ in range(3)]
    ids = torch.randint(2048, (8, 257))
    model = nn.Sequential(nn.Embedding(2048, 256), *layers, nn.Linear(256, 2048))
    return model, (ids[:, :-1], ids[:, 1:]), lambda m, b: F.cross_entropy(m(b[0]).flatten(0, -2), b[1].flatten())


def _speech() -> tuple[nn.Module, Any, Step]:
    import transformers

    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    config = transformers.Wav2Vec2Config(
        **sizes, conv_dim=(128,) * 7, vocab_size=32, mask_time_prob=0.1, layerdrop=0.1, num_conv_pos_embeddings=32
    )
    batch = {"input_values": torch.randn(4, 16000), "labels": torch.randint(1, 32, (4, 10))}
    return transformers.Wav2Vec2ForCTC(config).train(), batch, lambda m, b: m(**b).loss


MODELS = {"gpt": _gpt, "experts": _experts, "speech": _speech}


if __name__ == "__main__":
    main()
