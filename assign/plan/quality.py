"""Compare the quality of plans: the direction of a metric, and the Pareto front of two measures."""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

_LESS_IS_BETTER = ("noise", "low_ratio", "loss", "error", "perplexity")


def is_maximized(metric: str) -> bool:
    """Whether a higher value of a metric is better; not for noise, the low ratio, a loss, an error or a perplexity."""
    return not any(word in metric.lower() for word in _LESS_IS_BETTER)


def pareto_front(items: Iterable[T], peak_bytes: Callable[[T], int], cost: Callable[[T], float]) -> list[T]:
    """Return the Pareto front of the items, the lowest peak first.

    Args:
        items: what to compare.
        peak_bytes: of an item; less is better.
        cost: of an item; less is better.
    """
    found: list[T] = []
    for item in sorted(items, key=lambda each: (peak_bytes(each), cost(each))):
        if not found or cost(item) < cost(found[-1]):
            found.append(item)
    return found
