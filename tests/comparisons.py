"""Comparisons made by hand, to see what summaries, tables and pictures make of them."""

import dataclasses
from typing import Any

from assign.training.comparison import Comparison, Run, VariantRow


def by_hand(variant: str, seed: int, accuracy: float, *, diverged: bool = False, promoted: int = 0) -> Run:
    """A run of one epoch and a low ratio of a half, an eighth less for each tensor promoted."""
    plain = variant == "fp32"
    metrics = {"accuracy": accuracy}
    return Run(
        variant=variant,
        seed=seed,
        low_ratio=None if plain else 0.5,
        low_ratio_bits=None if plain else 0.4,
        final_low_ratio=None if plain else 0.5 - promoted / 8,
        final_low_ratio_bits=None if plain else 0.4 - promoted / 16,
        hardware="paper",
        result={
            "metrics": dict(metrics),
            "fp32_metrics": {} if plain else {"accuracy": accuracy - 0.25},
            "loss": None if diverged else 1.5,
            "measured_peak_bytes": (1 + seed) * 2**20,
            "step_seconds": 0.5,
            "diverged": diverged,
            "message": "it diverged at step 3." if diverged else "",
            "epochs": [{"loss": 1.5, "metrics": dict(metrics)}],
            "promotions": [{}] * promoted,
        },
    )


def compared(*runs: Run, **changes: Any) -> Comparison:
    """The comparison of these runs."""
    rows = {
        run.variant: VariantRow(
            name=run.variant,
            plan=None if run.variant == "fp32" else "0123",
            recipe="" if run.variant == "fp32" else "hfp8",
            strategy="",
            promote_every=0,
        )
        for run in runs
    }
    made = Comparison(
        task="tiny",
        fingerprint="f",
        elements=1,
        epochs=1,
        backend="eager",
        device="cpu",
        versions={},
        created="",
        seeds=tuple(sorted({run.seed for run in runs})),
        variants=tuple(rows.values()),
        runs=runs,
    )
    return dataclasses.replace(made, **changes)
