"""The bootstrap of a mean for many scores of few values, as a whole test set's answers have."""

from __future__ import annotations

import numpy as np


def counted_interval(
    values: np.ndarray,
    distinct: np.ndarray,
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """`statistics.bootstrap` from counts: drawing n items is drawing how many have each value.

    BCa takes the percentiles Φ(z₀ + (z₀ + z)/(1 − a(z₀ + z))) of the resampled means, z₀ = Φ⁻¹ of
    the share of them below the mean and a = Σd³ / 6(Σd²)^1.5, d the jackknife's deviations
    (Efron 1987).

    Args:
        values: scores, shape (n,), not all equal. distinct: their distinct values, sorted.
    """
    from scipy.stats import norm

    n, mean, rng = len(values), values.mean(), np.random.default_rng(seed)
    counts = (values == distinct[:, None]).sum(1)
    means = rng.multinomial(n, counts / n, resamples) @ distinct / n
    near = np.isclose(means, mean, rtol=0, atol=1e-12)  # ties count half, whatever rounding says
    bias = norm.ppf(((means < mean) & ~near).mean() + near.mean() / 2)
    d = (distinct - mean) / (n - 1)
    skew = (counts * d**3).sum() / (6 * (counts * d**2).sum() ** 1.5)
    z = bias + norm.ppf([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = np.quantile(means, norm.cdf(bias + z / (1 - skew * z)))
    return float(low), float(high)
