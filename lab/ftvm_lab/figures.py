"""Arithmetic of the figures that the demo reports."""

from collections.abc import Iterable


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which that share of the values lies; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0
