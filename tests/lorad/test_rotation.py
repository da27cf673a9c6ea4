"""The maths against the plain reference, its gradients, what it keeps, and its precision."""

import pytest
import torch
import torch.nn.functional as F
from reference import reference_lorad_linear, reference_rotate

from diffusers_wadi.lorad import lorad_angles, lorad_linear, rotate

OUT, IN, RANK = 6, 8, 3


def problem(dtype=torch.float64, grad=("A", "B"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (2, 5, IN), "weight": (OUT, IN), "bias": (OUT,), "A": (OUT, RANK), "B": (RANK, IN // 2)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: t.to(dtype).requires_grad_(name in grad) for name, t in tensors.items()}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_rotation_and_layer_agree_with_the_reference(dtype, tolerance):
    p = problem(dtype, grad=())
    theta = lorad_angles(p["A"], p["B"])
    assert theta.dtype == dtype
    torch.testing.assert_close(theta, p["A"] @ p["B"])
    turned = rotate(p["weight"], theta)
    torch.testing.assert_close(turned, reference_rotate(p["weight"], theta), atol=tolerance, rtol=tolerance)
    expected = reference_lorad_linear(**p)
    torch.testing.assert_close(lorad_linear(**p), expected, atol=20 * tolerance, rtol=20 * tolerance)


def test_angles_are_float32_for_half_factors_and_under_autocast():
    p = problem(torch.bfloat16, grad=())
    exact = p["A"].float() @ p["B"].float()
    assert torch.equal(lorad_angles(p["A"], p["B"]), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lorad_angles(p["A"].float(), p["B"].float()), exact)
    torch.testing.assert_close(lorad_angles(p["A"], p["B"], scale=0.5), 0.5 * exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_angle_zero_is_the_identity_bit_for_bit(dtype):
    weight = torch.randn(OUT, IN).to(dtype)
    assert torch.equal(rotate(weight, torch.zeros(OUT, IN // 2)), weight)


def test_rotation_keeps_row_norms_and_is_undone_by_the_opposite_angle():
    weight, theta = torch.randn(64, 128), 3 * torch.randn(64, 64)
    turned = rotate(weight, theta)
    torch.testing.assert_close(turned.norm(dim=1), weight.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rotate(turned, -theta), weight, rtol=0, atol=1e-6)


def test_angles_of_two_rotations_add_and_full_turns_do_nothing():
    p = problem(grad=())
    one, two = lorad_angles(p["A"], p["B"]), lorad_angles(p["A"].flip(0), p["B"])
    torch.testing.assert_close(rotate(rotate(p["weight"], one), two), rotate(p["weight"], one + two))
    torch.testing.assert_close(rotate(p["weight"], one + 2 * torch.pi), rotate(p["weight"], one))


def test_odd_inputs_and_unfitting_angles_are_refused():
    with pytest.raises(ValueError, match="even, but `weight` has 7.*exclude_modules"):
        rotate(torch.randn(4, 7), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"\(1, 4\) do not fit a weight of shape \(6, 8\)"):
        rotate(torch.randn(6, 8), torch.zeros(1, 4))


@pytest.mark.parametrize(
    "grad", [("x", "weight", "bias", "A", "B"), ("A",), ("B",), ("x",), ("weight", "x"), ("bias",)]
)
def test_gradients_equal_autograd_through_the_reference(grad):
    ours, plain = problem(grad=grad), problem(grad=grad)
    upstream = torch.randn(2, 5, OUT, dtype=torch.float64)
    lorad_linear(**ours).backward(upstream)
    reference_lorad_linear(**plain).backward(upstream)
    for name in ours:
        assert (ours[name].grad is None) == (name not in grad), name
        if name in grad:
            torch.testing.assert_close(ours[name].grad, plain[name].grad, msg=name)


def test_gradients_equal_finite_differences_to_second_order():
    p = tuple(problem(grad=("x", "weight", "bias", "A", "B")).values())
    assert torch.autograd.gradcheck(lorad_linear, p)
    small = tuple(t.detach()[..., :4].clone().requires_grad_() if t.shape[-1] == IN else t for t in p)
    small = (*small[:4], p[4].detach()[:, :2].clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lorad_linear, small)


@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, 4, IN)])
def test_any_number_of_leading_axes(shape):
    p = problem(torch.float32)
    p["x"] = torch.randn(shape, requires_grad=True)
    y = lorad_linear(**p)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert p["x"].grad.shape == shape and p["A"].grad.shape == p["A"].shape


def saved_tensors(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


@pytest.mark.parametrize("amp", [False, True])
def test_only_the_inputs_are_kept_for_the_backward_pass(amp):
    p = problem(torch.float32, grad=("x", "A", "B"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        saved = saved_tensors(lambda: lorad_linear(**p))
    assert 0 < len(saved) <= 4
    assert sorted(t.shape for t in saved) == sorted(p[name].shape for name in ("x", "weight", "A", "B"))
    # The weight, the factors and (without autocast, which casts it) the input are not even copied.
    owned = {p[name].data_ptr() for name in ("x", "weight", "A", "B")}
    assert sum(t.data_ptr() in owned for t in saved) == (3 if amp else 4)


def test_a_frozen_adapter_does_not_keep_the_input():
    p = problem(torch.float32, grad=("x",))
    assert p["x"].data_ptr() not in {t.data_ptr() for t in saved_tensors(lambda: lorad_linear(**p))}


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_autocast_computes_products_low_and_everything_else_in_float32(dtype, tolerance):
    p, full = problem(torch.float32, grad=("x", "A", "B")), problem(torch.float32, grad=("x", "A", "B"))
    with torch.autocast("cpu", dtype=dtype):
        y = lorad_linear(**p)
        expected = F.linear(p["x"], rotate(p["weight"], p["A"] @ p["B"]).detach(), p["bias"])
        assert y.dtype == expected.dtype == dtype
        y.float().square().sum().backward()  # inside the context, as some training loops do
    lorad_linear(**full).square().sum().backward()
    for name in ("x", "A", "B"):
        assert p[name].grad.dtype == torch.float32
        error = (p[name].grad - full[name].grad).norm() / full[name].grad.norm()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_base_with_float32_factors(dtype, tolerance):
    full = problem(torch.float32, grad=("A", "B"))
    p = problem(torch.float32, grad=("A", "B"))
    p.update({name: p[name].to(dtype) for name in ("x", "weight", "bias")})
    y = lorad_linear(**p)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    lorad_linear(**full).square().sum().backward()
    for name in ("A", "B"):
        error = (p[name].grad - full[name].grad).norm() / full[name].grad.norm()
        assert p[name].grad.dtype == torch.float32 and error < tolerance


def test_meta_tensors_pass_through():
    p = {name: t.detach().to("meta") for name, t in problem(torch.float32).items()}
    assert lorad_linear(**p).shape == (2, 5, OUT)


@pytest.mark.slow
@pytest.mark.parametrize("amp, tolerance", [(False, 1e-6), (True, 4e-3)])
def test_one_graph_for_the_compiler(amp, tolerance):
    torch._dynamo.reset()
    compiled = torch.compile(lorad_linear, fullgraph=True, backend="aot_eager")
    ours, plain = problem(torch.float32, ("x", "A", "B")), problem(torch.float32, ("x", "A", "B"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        one, two = compiled(**ours), lorad_linear(**plain)
    torch.testing.assert_close(one, two)
    one.float().sum().backward()
    two.float().sum().backward()
    for name in ("x", "A", "B"):
        assert (ours[name].grad - plain[name].grad).norm() / plain[name].grad.norm() < tolerance, name
