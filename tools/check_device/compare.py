"""Measures of the difference between computed and expected values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tools.check_device.registry import Finding


def by_largest(found: np.ndarray, expected: np.ndarray) -> float:
    """Return max |difference| / max |expected|; infinity if a value is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def by_norm(found: np.ndarray, expected: np.ndarray, floor: float = 1e-30) -> float:
    """Return |difference| / max(|expected|, floor) in the Euclidean norm."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), floor))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest relative difference."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float((np.abs(found - expected) / np.abs(expected)).max())


def check_limits(differences: Mapping[str, float], limits: float | Mapping[str, float]) -> Finding:
    """Return a finding on several differences; it shows the worst one relative to its limit.

    Args:
        differences: differences by name.
        limits: one for all, or one for each name.
    """
    if not isinstance(limits, Mapping):
        limits = dict.fromkeys(differences, limits)

    def excess(name: str) -> float:
        if limits[name] == 0:
            return float("inf") if differences[name] > 0 else 0.0
        return differences[name] / limits[name]

    worst = max(differences, key=excess)
    outside = [name for name in differences if not differences[name] <= limits[name]]
    return Finding(
        f"{differences[worst]:.1e} ({worst})",
        f"{limits[worst]:g}",
        not outside,
        hint=f"outside the limit: {', '.join(outside[:8])}" if outside else "",
        details={"differences": dict(differences)},
    )
