"""Every way of computing a rotation gives the same numbers, in the memory and the cases that it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import reference_rotate

from diffusers_wadi.lorad import LoRaDConfig, LoRaDLinear, lorad_angles, lorad_linear, rotate_weight, turned_rows
from diffusers_wadi.lorad.kernels import chunked, selection
from diffusers_wadi.lorad.rotation import (
    factor_gradients,
    get_rotation_backend,
    rotation_backend,
    set_rotation_backend,
    turn_weight,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from live_bytes import PeakBytes  # noqa: E402

sys.path.pop(0)

# (out, numbers per row, rank): one block, several with a smaller last one, odd rows, one pair, no pair, no rows, high rank.
SIZES = [(6, 8, 3), (200, 650, 17), (131, 301, 7), (5, 3, 1), (4, 1, 2), (0, 8, 2), (90, 1024, 300)]
DTYPES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def problem(out, size, rank, dtype=torch.float32, factors=torch.float32, seed=0):
    """(W, A, B, G) with angles of about a radian."""
    make = torch.Generator().manual_seed(seed)
    W, G = (torch.randn(out, size, generator=make, dtype=torch.float64).to(dtype) for _ in range(2))
    A = torch.randn(out, rank, generator=make, dtype=torch.float64)
    B = torch.randn(rank, size // 2, generator=make, dtype=torch.float64) / rank**0.5
    return W, A.to(factors), B.to(factors), G


def exact(W, A, B, G):
    """The turned weight and the gradients of A and B, in float64 by the plain formula and autograd through it."""
    W, A, B, G = (t.double() for t in (W, A, B, G))
    A.requires_grad_(), B.requires_grad_()
    turned = rotate_weight(W, A @ B)
    return turned.detach(), *torch.autograd.grad(turned, (A, B), G)


def assert_near(found, expected, tolerance):
    scale = expected.abs().max() if expected.any() else 1.0
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.fixture(params=["plain", "chunked"])
def backend(request):
    with rotation_backend(request.param):
        yield request.param


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(chunked, "_ANGLES", 64)
    monkeypatch.setattr(chunked, "_MIN_ROWS", 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_turned_weights_and_gradients_are_those_of_float64(size, dtype, backend):
    W, A, B, G = problem(*size, dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    turned, d_A, d_B = exact(W, A, B, G)
    found = turn_weight(W, A, B)
    assert found.dtype == dtype and found.shape == W.shape
    assert_near(found, turned, DTYPES[dtype])
    if size[1] % 2:
        assert torch.equal(found[:, -1], W[:, -1])
    for mine, expected in zip(factor_gradients(W, G, A, B), (d_A, d_B)):
        assert mine.dtype == A.dtype and mine.shape == expected.shape
        assert_near(mine, expected, 1e-12 if dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 23])
def test_blocks_of_all_sizes_against_numbers_one_by_one(rows, small_blocks):
    W, A, B, G = problem(rows, 11, 4, torch.float64, torch.float64)
    with rotation_backend("chunked"):
        expected = W.clone()
        expected[:, :10] = reference_rotate(W[:, :10], A @ B)
        torch.testing.assert_close(turn_weight(W, A, B), expected)
        for mine, theirs in zip(factor_gradients(W, G, A, B), exact(W, A, B, G)[1:]):
            torch.testing.assert_close(mine, theirs)


def test_the_inverse_undoes_and_wide_is_closer(backend):
    W, A, B, _ = problem(200, 650, 17)
    turned = turn_weight(W, A, B)
    assert_near(turn_weight(turned, A, B, inverse=True), W.double(), 1e-6)
    theta = lorad_angles(A, B).double()
    wide, expected = turn_weight(W, A, B, wide=True), rotate_weight(W.double(), theta)
    assert (wide - expected).abs().max() < 2.5e-7 < (turned - expected).abs().max()  # half an ulp at 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(200, 650), (131, 301), (70, 5, 3, 3)], ids=str)
def test_angle_zero_is_the_identity_bit_for_bit(shape, dtype, backend):
    W = torch.randn(shape).to(dtype)
    A, B = torch.zeros(shape[0], 5), torch.randn(5, W[0].numel() // 2)
    assert torch.equal(turn_weight(W, A, B), W) and torch.equal(turn_weight(W, A, B, inverse=True), W)


def test_row_norms_are_kept(backend):
    W, A, B, _ = problem(200, 650, 17)
    torch.testing.assert_close(turn_weight(W, A, B).norm(dim=1), W.norm(dim=1), rtol=1e-6, atol=0)


def views(W):
    """The same numbers in other places of memory."""
    padded = torch.zeros(len(W), W.shape[1] + 3, dtype=W.dtype)
    for first in (0, 1, 2):  # even and odd offsets, in rows of an odd length
        padded[:, first : first + W.shape[1]] = W
        yield padded[:, first : first + W.shape[1]]
        padded = torch.zeros_like(padded)
    yield W.T.contiguous().T
    yield torch.stack([W, W], dim=2)[..., 1]


@pytest.mark.parametrize("size", [(200, 650, 17), (131, 301, 7)], ids=str)
def test_any_strides_and_the_result_keeps_them(size, backend):
    W, A, B, G = problem(*size)
    turned, *gradients = exact(W, A, B, G)
    for view in views(W):
        found = turn_weight(view, A, B)
        assert_near(found, turned, 3e-6)
        assert found.stride() == rotate_weight(view, A @ B).stride()
        for mine, expected in zip(factor_gradients(view, G.T.contiguous().T, A, B), gradients):
            assert_near(mine, expected, 3e-6)
    found = turn_weight(W.T.contiguous().T, A.T.contiguous().T, B.T.contiguous().T, torch.bfloat16)
    assert found.stride() == (1, len(W)) and found.dtype == torch.bfloat16
    assert_near(found, turned, DTYPES[torch.bfloat16])


def test_several_adapters_with_scales_are_one(backend):
    torch.manual_seed(0)
    layer = LoRaDLinear(torch.nn.Linear(600, 90, bias=False), "a", 5, LoRaDConfig(r=5))
    layer.update_layer("b", 3, LoRaDConfig(r=3))
    for name, scale in (("a", 0.5), ("b", -2.0)):
        torch.nn.init.normal_(layer.lorad_A[name])
        layer.set_scale(name, scale)
    layer.set_adapter(["a", "b"])
    A, B = ({name: value.double() for name, value in factors.items()} for factors in (layer.lorad_A, layer.lorad_B))
    theta = 0.5 * A["a"] @ B["a"] - 2.0 * A["b"] @ B["b"]
    x, weight = torch.randn(4, 600), rotate_weight(layer.base_layer.weight.double(), theta)
    torch.testing.assert_close(layer(x), (x.double() @ weight.T).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("odd", [0, 1])
def test_gradients_equal_finite_differences(odd, backend, small_blocks):
    W, A, B, _ = (t.requires_grad_() for t in problem(7, 8 + odd, 3, torch.float64, torch.float64))
    x = torch.randn(5, 8 + odd, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: lorad_linear(t[0], t[1], None, *t[2:]), (x, W, A, B))
    assert torch.autograd.gradcheck(turned_rows, (W, A, B))
    assert torch.autograd.gradgradcheck(lambda *t: lorad_linear(t[0], t[1], None, *t[2:]), (x, W, A, B))


def test_recorded_gradients_take_the_plain_formula():
    W, A, B, G = problem(200, 650, 17)
    A.requires_grad_(), B.requires_grad_()
    with rotation_backend("chunked"):
        found = torch.autograd.grad(turn_weight(W, A, B), (A, B), G)
    for mine, expected in zip(found, exact(W, A.detach(), B.detach(), G)[1:]):
        assert_near(mine, expected, 3e-6)


def test_a_step_is_the_same_to_the_bit_each_time():
    W, A, B, _ = problem(200, 650, 17)
    x, seen = torch.randn(8, 650), []
    for _ in range(3):
        leaves = [A.clone().requires_grad_(), B.clone().requires_grad_()]
        y = lorad_linear(x, W, None, *leaves)
        y.square().sum().backward()
        seen.append([y.detach(), *(t.grad for t in leaves)])
        torch.randn(12345)  # other memory is free the next time
    assert all(torch.equal(a, b) for later in seen[1:] for a, b in zip(seen[0], later))


# What the plain way has at once: angles, cosines, sines, two products of pairs, and for the gradient the turned weight.
@pytest.mark.parametrize("size, share", [((320, 320, 64), 0.5), ((2560, 640, 64), 0.25)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_take_a_fraction_of_the_memory(size, share, dtype):
    W, A, B, G = problem(*size, dtype)
    peaks = {}
    for backend in ("plain", "chunked"):
        with rotation_backend(backend), PeakBytes(W, A, B, G) as turning:
            result = turn_weight(W, A, B)
        turning.peak -= result.numel() * result.element_size()
        with rotation_backend(backend), PeakBytes(W, A, B, G) as deriving:
            gradients = factor_gradients(W, G, A, B)
        deriving.peak -= sum(g.numel() * g.element_size() for g in gradients)
        peaks[backend] = (turning.peak, deriving.peak)
    assert peaks["plain"][0] > 4 * W.numel()  # the count sees angles, cosines and sines
    for mine, plain in zip(peaks["chunked"], peaks["plain"]):
        assert 0 < mine <= share * plain, peaks


def test_a_backward_pass_holds_one_matrix_at_a_time():
    W, A, B, _ = problem(4096, 512, 4)
    x, leaves = torch.randn(2, 512, requires_grad=True), [A.requires_grad_(), B.requires_grad_()]
    with rotation_backend("chunked"):
        y = lorad_linear(x, W, None, *leaves)
        with PeakBytes(x, W, A, B) as counted:
            y.sum().backward()
    assert W.numel() * 4 < counted.peak < 1.5 * W.numel() * 4  # the blocks are a quarter of a matrix here


class TestChoice:
    """Which backend a call takes."""

    def test_by_device_and_size(self):
        big, small = problem(250, 650, 17)[:3], problem(6, 8, 3)[:3]
        assert selection.backend_for(*big) == "chunked" and selection.backend_for(*small) == "plain"
        assert selection.backend_for(*(t.to("meta") for t in big)) == "plain"
        assert selection.backend_for(big[0], big[1].requires_grad_(), big[2]) == "plain"
        with torch.no_grad():
            assert selection.backend_for(*big) == "chunked"

    def test_one_can_be_forced_for_a_while(self):
        small = problem(6, 8, 3)[:3]
        with rotation_backend("chunked"):
            with rotation_backend("plain"):
                assert get_rotation_backend() == "plain"
            assert selection.backend_for(*small) == "chunked"
            with pytest.raises(RuntimeError), rotation_backend("plain"):
                raise RuntimeError
            assert get_rotation_backend() == "chunked"
        assert get_rotation_backend() == "auto"

    def test_unknown_names_are_refused_and_change_nothing(self):
        with pytest.raises(ValueError, match="no rotation backend 'fast'.*auto, plain, chunked, triton"):
            set_rotation_backend("fast")
        assert get_rotation_backend() == "auto"

    def test_the_environment_sets_it(self, monkeypatch):
        monkeypatch.setattr(selection, "_active", None)
        monkeypatch.setenv("WADI_ROTATION_BACKEND", "Plain")
        assert selection.backend_for(*problem(200, 650, 17)[:3]) == "plain"
        monkeypatch.setattr(selection, "_active", None)
        monkeypatch.setenv("WADI_ROTATION_BACKEND", "quick")
        with pytest.raises(ValueError, match="'quick'"):
            get_rotation_backend()
        monkeypatch.undo()

    def test_a_forced_one_that_cannot_says_why(self, monkeypatch):
        tensors = problem(200, 650, 17)[:3]
        monkeypatch.setattr(selection, "_has_triton", lambda: True)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with rotation_backend("triton"):
            with pytest.raises(ValueError, match=r"lies on cpu.*set_rotation_backend\('auto'\)"):
                turn_weight(*tensors)
            monkeypatch.setenv("TRITON_INTERPRET", "1")
            with pytest.raises(ValueError, match="factor A is torch.float64"):
                turn_weight(tensors[0], tensors[1].double(), tensors[2])

    def test_without_triton_it_is_missed_at_once_when_forced_and_never_else(self, monkeypatch):
        monkeypatch.setattr(selection, "_has_triton", lambda: False)
        with pytest.raises(ImportError, match="pip install triton"):
            set_rotation_backend("triton")
        assert selection._triton_refusal(*problem(6, 8, 3)[:3]) == "Triton is not installed"

    def test_a_failing_triton_is_left_with_a_warning_unless_forced(self, monkeypatch):
        monkeypatch.setattr(selection, "_triton_failed", False)
        monkeypatch.setattr(selection, "_has_triton", lambda: True)
        with pytest.warns(UserWarning, match="Triton could not.*no compiler"):
            selection.give_up_triton(RuntimeError("no compiler"))
        assert selection._triton_failed
        with pytest.raises(RuntimeError, match="no compiler"), rotation_backend("triton"):
            selection.give_up_triton(RuntimeError("no compiler"))
        with pytest.raises(torch.OutOfMemoryError):
            selection.give_up_triton(torch.OutOfMemoryError("full"))


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_unfitting_factors_are_refused(backend):
    W, A, B, G = problem(200, 650, 17)
    for factors in ((A[:1], B), (A, B[:, :1]), (A[:, :3], B)):
        with rotation_backend(backend), pytest.raises(ValueError, match=r"do not fit a weight of 200 rows of 650"):
            turn_weight(W, *factors)


def run_interpreted(code: str) -> str:
    """The output of a fresh process in which Triton's kernels run on the CPU."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([*sys.path, str(tests)])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_triton() -> None:
    """Run by the test below in a process of its own, in which nothing but this asks for Triton."""
    kernels = "diffusers_wadi.lorad.kernels.triton_kernels"
    lorad_linear(torch.randn(2, 650), *problem(200, 650, 3)[:1], None, *problem(200, 650, 3)[1:3])
    assert kernels not in sys.modules
    tolerances = {**DTYPES, torch.bfloat16: 2e-2}  # the interpreter cuts to bfloat16 where a GPU rounds
    cases = [(6, 8, 3), (70, 131, 40), (130, 70, 17), (3, 2, 1), (0, 8, 2), (64, 128, 300), (4, 1, 2)]
    for case in cases:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            W, A, B, G = problem(*case, dtype)
            turned, d_A, d_B = exact(W, A, B, G)
            with rotation_backend("triton"):
                found = turn_weight(W, A, B)
                back = turn_weight(found.float(), A, B, inverse=True)
                gradients = factor_gradients(W, G, A, B)
                still = turn_weight(W, torch.zeros_like(A), B)
            assert found.dtype == dtype and torch.equal(still, W)
            assert_near(found, turned, tolerances[dtype])
            assert_near(back, W.double(), 2 * tolerances[dtype])
            assert_near(gradients[0], d_A, 3e-6), assert_near(gradients[1], d_B, 3e-6)
            assert not case[1] % 2 or torch.equal(found[:, -1], W[:, -1])
    W, A, B, G = problem(70, 131, 40)
    turned, *expected = exact(W, A, B, G)
    with rotation_backend("triton"):
        for view in views(W):
            assert_near(turn_weight(view, A.T.contiguous().T, B.T.contiguous().T), turned, 3e-6)
            for mine, theirs in zip(factor_gradients(view, G.T.contiguous().T, A, B.half()), expected):
                assert_near(mine, theirs, 1e-3)
        assert_near(turn_weight(W, A, B, wide=True), turned, 1e-6)  # by blocks: Triton has no float64 here
        leaves = [t.clone().requires_grad_() for t in (W, A, B)]
        turned_rows(*leaves).backward(G)
    for leaf, theirs in zip(leaves[1:], expected):
        assert_near(leaf.grad, theirs, 3e-6)
    assert kernels in sys.modules
    print("checked")


def test_triton_through_its_interpreter():
    pytest.importorskip("triton")
    assert run_interpreted("import test_kernels; test_kernels.check_triton()").strip() == "checked"


def compiled(kernel, weights: str, capability: int, precision: str) -> str:
    """The PTX of a kernel for float32 factors, compiled without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"INVERSE": True, "ROWS": 64, "PAIRS": 64, "RANKS": 32, "PRECISION": precision}
    constants |= dict.fromkeys(("w_column", "r_column", "g_column", "a_rank", "b_pair"), 1)
    names = [parameter.name for parameter in kernel.params]
    kinds = {name: f"*{weights}" if name in "WGR" else "*fp32" if name in "ABD" else "i32" for name in names}
    kinds |= {name: "constexpr" for name in names if name in constants}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    done = triton.compile(
        ASTSource(kernel, kinds, values, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "num_stages": 3},
    )
    return done.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("capability, product", [(80, "mma.sync"), (90, "wgmma.mma_async")])
@pytest.mark.parametrize("weights", ["fp16", "bf16", "fp32"])
def test_the_kernels_compile_for_gpus(weights, capability, product):
    pytest.importorskip("triton")
    from diffusers_wadi.lorad.kernels import triton_kernels

    for kernel in (triton_kernels._turn_kernel, triton_kernels._gradient_kernel):
        ptx = compiled(kernel, weights, capability, "tf32x3")
        assert product in ptx and ".tf32" in ptx  # products on tensor cores
        assert "v4" in ptx  # 16 bytes at a time from and to memory
        assert product not in compiled(kernel, weights, capability, "ieee")
