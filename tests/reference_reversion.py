"""ReVersion's sampler and steering loss in plain numbers, one term at a time."""

import math


def importance_probability(t: int, steps: int, alpha: float) -> float:
    """f(t) / sum f, f(t) = (1 - alpha cos(pi t / T)) / T."""
    f = [(1 - alpha * math.cos(math.pi * k / steps)) / steps for k in range(steps)]
    return f[t] / math.fsum(f)


def steering_loss(row: list[float], positives: list[list[float]], negatives: list[list[float]], tau: float) -> float:
    """-log of the positives' share in the sum of exp(cosine / tau)."""

    def term(other: list[float]) -> float:
        dot = math.fsum(a * b for a, b in zip(row, other))
        return math.exp(dot / math.hypot(*row) / math.hypot(*other) / tau)

    near, far = (math.fsum(term(m) for m in rows) for rows in (positives, negatives))
    return -math.log(near / (near + far))


def negatives(captions: list[str], vocabulary: dict[str, int], excluded: set[str]) -> list[int]:
    """Ids of the words of captions that are not excluded, in order, with repeats."""
    return [vocabulary[word] for caption in captions for word in caption.split() if word not in excluded]
