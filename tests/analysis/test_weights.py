"""The measures on single weights, against numbers by hand, plain loops and closed forms."""

import math

import pytest
import torch

from diffusers_wadi.analysis import weights as measures
from diffusers_wadi.analysis.weights import (
    recombine,
    rotation_left,
    singular_value_energies,
    squared_norm,
    vector_changes,
)
from diffusers_wadi.lorad.rotation import rotate_weight


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[2**22, 16])
def block(request, monkeypatch):
    """Whole weights at once, and a row or two at a time."""
    monkeypatch.setattr(measures, "_BLOCK", request.param)


def rotation_share(base, tuned):
    return 1 - rotation_left(base, tuned) / squared_norm(tuned - base)


def test_by_hand():
    base, tuned = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[6.0, 8.0], [2.0, 0.0]])
    # The paper's columns, which are PyTorch's rows: (3, 4) doubles and keeps its direction, (0, 2) makes a quarter turn.
    norm, direction = vector_changes(base, tuned)
    assert norm.tolist() == [1.0, 0.0] and direction.tolist() == pytest.approx([0.0, math.sqrt(2)])
    # The other reading: (3, 0) -> (6, 2) and (4, 2) -> (8, 0).
    norm, direction = vector_changes(base, tuned, "row")
    assert norm.tolist() == pytest.approx([math.sqrt(40) / 3 - 1, 8 / math.sqrt(20) - 1])
    cosines = [18 / (3 * math.sqrt(40)), 32 / (8 * math.sqrt(20))]
    assert direction.tolist() == pytest.approx([math.sqrt(2 - 2 * c) for c in cosines])
    # The pairs: from length 5 to 10, and a turn of length 2; the whole change is 25 + 8.
    assert rotation_left(base, tuned) == pytest.approx(25) and squared_norm(tuned - base) == pytest.approx(33)
    # The difference [[3, 4], [2, -2]] has a Gram matrix [[25, -2], [-2, 8]].
    roots = [(33 + sign * math.sqrt(17**2 + 16)) / 2 for sign in (1, -1)]
    assert singular_value_energies(tuned - base).tolist() == pytest.approx([root / 33 for root in roots])
    # Norms of the first, directions of the second: (6, 8) / 2 and (2, 0).
    assert torch.allclose(recombine(base, tuned), torch.tensor([[3.0, 4.0], [2.0, 0.0]]))


@pytest.mark.parametrize("shape", [(6, 8), (9, 4), (5, 3, 3, 3), (7, 5)])
@pytest.mark.parametrize("convention", ["column", "row"])
def test_against_plain_loops(shape, convention, block):
    base, tuned = random(*shape), random(*shape, seed=1)
    rows = [w.flatten(1).double() for w in (base, tuned)]
    first, second = [m if convention == "column" else m.T for m in rows]
    norms, directions = [], []
    for w0, w1 in zip(first, second):
        norms.append((abs(w1.norm() - w0.norm()) / w0.norm()).item())
        directions.append((w1 / w1.norm() - w0 / w0.norm()).norm().item())
    norm, direction = vector_changes(base, tuned, convention)
    assert norm.tolist() == pytest.approx(norms) and direction.tolist() == pytest.approx(directions)
    left, n = 0.0, rows[0].shape[1]
    for w0, w1 in zip(*rows):
        for j in range(0, n - 1, 2):
            left += (math.hypot(*w1[j : j + 2]) - math.hypot(*w0[j : j + 2])) ** 2
        left += float((w1[-1] - w0[-1]) ** 2) if n % 2 else 0.0
    assert rotation_left(base, tuned) == pytest.approx(left)
    values = torch.linalg.svdvals(rows[1] - rows[0]).square()
    energies = singular_value_energies(tuned - base)
    assert torch.allclose(energies, values / values.sum(), atol=1e-6) and energies.sum().item() == pytest.approx(1)
    swapped = recombine(base, tuned, convention).flatten(1).double()
    again = swapped if convention == "column" else swapped.T
    for w, w0, w1 in zip(again, first, second):
        assert w.norm().item() == pytest.approx(w0.norm().item(), rel=1e-6)
        assert torch.allclose(w / w.norm(), w1 / w1.norm(), atol=1e-6)


def test_closed_forms(block):
    base, theta = random(12, 16), random(12, 8, seed=2)
    turned = rotate_weight(base, theta)
    norm, direction = vector_changes(base, turned)
    assert norm.max() < 1e-6 and direction.min() > 0.1
    assert rotation_share(base, turned) == pytest.approx(1, abs=1e-12)
    norm, direction = vector_changes(base, 1.7 * base)
    assert torch.allclose(norm, torch.full_like(norm, 0.7), atol=1e-6) and direction.max() < 1e-6
    assert rotation_share(base, 1.7 * base) == pytest.approx(0, abs=1e-6)  # a longer pair has not turned at all
    # One angle for all pairs: the chord of that angle.
    norm, direction = vector_changes(base, rotate_weight(base, torch.full((12, 8), 0.3)))
    assert torch.allclose(direction, torch.full_like(direction, 2 * math.sin(0.15)), atol=1e-6)
    # A small random change turns half.
    big = random(200, 200)
    assert rotation_share(big, big + 1e-3 * random(200, 200, seed=3)) == pytest.approx(0.5, abs=0.02)


def test_a_tiny_turn_keeps_its_digits():
    base = random(4, 64).double()
    _, direction = vector_changes(base, rotate_weight(base, torch.full((4, 32), 1e-7, dtype=torch.float64)))
    assert torch.allclose(direction, torch.full_like(direction, 1e-7), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (5,), (5, 4), (2, 3, 4)])
def test_squared_norm_of_any_shape(shape, block):
    assert squared_norm(random(*shape)) == pytest.approx(random(*shape).square().sum().item())


def test_energies_of_low_rank_and_of_nothing():
    change = random(10, 2) @ random(2, 30, seed=1)
    energies = singular_value_energies(change)
    assert energies.shape == (10,) and energies[:2].sum() == pytest.approx(1) and energies[2:].max() < 1e-9
    assert singular_value_energies(torch.zeros(3, 4)).tolist() == [0, 0, 0]


def test_vectors_of_zeros_have_no_direction():
    base, tuned = random(3, 4), random(3, 4, seed=1)
    base[0], tuned[1] = 0, 0
    norm, direction = vector_changes(base, tuned)
    assert norm.shape == direction.shape == (1,)
    swapped = recombine(tuned, base)
    assert swapped[0].abs().max() == 0 and swapped[1].abs().max() == 0 and torch.isfinite(swapped).all()


def test_an_unknown_convention():
    with pytest.raises(ValueError, match="'column'.*'row'.*got 'rows'"):
        vector_changes(torch.ones(2, 2), torch.ones(2, 2), "rows")
