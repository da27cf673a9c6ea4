"""One base in three roles."""

import pytest
import torch
from conftest import tiny_unet
from test_losses import make_networks

from diffusers_wadi import LoRaDConfig
from diffusers_wadi.distillation.networks import WaDiNetworks

X, T, TEXT = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 5, 16)


def outputs(networks: WaDiNetworks) -> list[torch.Tensor]:
    with torch.no_grad():
        return [role(X, T, TEXT) for role in (networks.student, networks.fake, networks.teacher)]


def test_roles_differ_and_teacher_is_the_base():
    torch.manual_seed(0)
    with torch.no_grad():
        base = tiny_unet()(X, T, TEXT).sample
    student, fake, teacher = outputs(make_networks())
    assert torch.equal(teacher, base)
    assert not torch.allclose(student, base) and not torch.allclose(fake, base) and not torch.allclose(student, fake)


def test_new_adapters_are_the_teacher_bit_for_bit():
    student, fake, teacher = outputs(make_networks(size=0))
    assert torch.equal(student, teacher) and torch.equal(fake, teacher)


def test_fake_does_not_act_where_it_has_no_adapter():
    """The student's layers are more than the fake's; what the student learns there must not leak into the fake."""
    networks = make_networks()
    fake = outputs(networks)[1]
    for parameter in networks.student_parameters():
        parameter.data.add_(1.0)
    assert torch.equal(outputs(networks)[1], fake)
    assert set(networks.role_state("fake")) < set(networks.role_state("student"))


def test_both_adapters_train_and_nothing_else():
    networks = make_networks()
    for role in ("student", "fake", "teacher"):
        networks.select(role)
        trained = {id(p) for p in networks.student_parameters() + networks.fake_parameters()}
        assert {id(p) for p in networks.unet.parameters() if p.requires_grad} == trained


def test_selected_goes_back():
    networks = make_networks()
    networks.select("fake")
    with pytest.raises(RuntimeError), networks.selected("teacher"):
        assert networks.role == "teacher"
        raise RuntimeError
    assert networks.role == "fake"


def student_gradients(networks: WaDiNetworks) -> list[torch.Tensor]:
    loss = networks.student(X, T, TEXT).square().mean()
    with torch.no_grad():  # as in training, where other roles run between forward and backward
        networks.teacher(X, T, TEXT)
        networks.fake(X, T, TEXT)
    loss.backward()
    assert networks.role == "fake"
    return [parameter.grad for parameter in networks.student_parameters()]


def test_gradient_checkpointing_recomputes_in_the_right_role():
    expected, networks = student_gradients(make_networks()), make_networks()
    networks.enable_gradient_checkpointing()
    assert networks.unet.is_gradient_checkpointing
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(student_gradients(networks), expected))


@pytest.mark.slow
def test_compiled_network_follows_the_roles():
    expected, networks = student_gradients(make_networks()), make_networks()
    networks.compile(backend="eager")  # Dynamo's tracing and guards, without minutes of code generation
    try:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(student_gradients(networks), expected))
    finally:
        torch._dynamo.reset()


def test_state_goes_back_in_place_or_not_at_all():
    networks, other = make_networks(), make_networks(size=0)
    before, identities = outputs(networks)[0], [id(p) for p in other.student_parameters()]
    state = {name: value.detach().clone() for name, value in networks.role_state("student").items()}
    other.load_role_state("student", state)
    assert torch.equal(outputs(other)[0], before) and identities == [id(p) for p in other.student_parameters()]
    name = next(iter(state))
    for damage in ({name: state[name][:1]}, {"elsewhere.lorad_A": state[name]}):
        with pytest.raises(ValueError, match="1 of .* tensors do not fit the student"):
            networks.load_role_state("student", {k: torch.zeros_like(v) for k, v in state.items()} | damage)
    assert torch.equal(outputs(networks)[0], before)


def test_student_has_to_come_from_somewhere():
    with pytest.raises(ValueError, match="no adapter 'student'"):
        WaDiNetworks(tiny_unet(), None, LoRaDConfig(r=2, target_modules=["to_q"]))


def test_half_precision_base_takes_float32_inputs():
    unet = tiny_unet().to(torch.bfloat16)
    config = LoRaDConfig(r=2, target_modules=["to_q"])
    networks = WaDiNetworks(unet, config, config)
    assert networks.student(X, T, TEXT).dtype == torch.bfloat16
    assert networks.student_parameters()[0].dtype == torch.float32
