"""LoRaD on embeddings and on transformers' Conv1D: the plain maths, what is turned and trained, and odd sizes."""

import copy
import pickle

import pytest
import torch
from backbones import add_adapter, fill_adapter
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from reference import reference_lorad_linear, reference_rotate
from torch import nn
from transformers.pytorch_utils import Conv1D

from diffusers_wadi.lorad import (
    LoRaDConfig,
    LoRaDEmbedding,
    LoRaDLinear,
    LoRaDTransposedLinear,
    mixed_adapter_batch,
    trainable_parameter_count,
    turned_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
TOKENS = torch.tensor([[1, 4, 4, 0], [2, 3, 1, 6]])


def embedding(names=("default",), size=6, dtype=torch.float32, **options):
    torch.manual_seed(0)
    adapted = LoRaDEmbedding(nn.Embedding(7, size, dtype=dtype, **options), names[0], 3, LoRaDConfig(r=3))
    return filled(adapted, names)


def conv1d(names=("default",), size=6, dtype=torch.float32):
    torch.manual_seed(0)
    base = Conv1D(8, size).to(dtype)
    nn.init.normal_(base.bias)
    return filled(LoRaDTransposedLinear(base, names[0], 3, LoRaDConfig(r=3)), names)


def filled(adapted, names):
    adapted.base_layer.requires_grad_(False)
    for name in names[1:]:
        adapted.update_layer(name, 3, LoRaDConfig(r=3))
    for name in names:
        nn.init.normal_(adapted.lorad_A[name], std=0.5)
    adapted.set_adapter(list(names))
    return adapted


def angles(adapted):
    return sum(adapted.scaling[n] * adapted.lorad_A[n] @ adapted.lorad_B[n] for n in adapted.active_adapters).detach()


def inputs(size=6):
    return torch.randn(2, 5, size, generator=torch.Generator().manual_seed(1))


def reference_table(adapted):
    """The table with every token's vector turned; an odd last column stays."""
    table, theta = adapted.base_layer.weight.detach().float(), angles(adapted)
    paired = 2 * theta.shape[1]
    return torch.cat([reference_rotate(table[:, :paired], theta), table[:, paired:]], dim=1)


def reference_product(adapted, x):
    weight, theta = adapted.base_layer.weight.detach().T, angles(adapted)
    paired = 2 * theta.shape[1]
    turned = torch.cat([reference_rotate(weight[:, :paired], theta), weight[:, paired:]], dim=1)
    return x @ turned.T + adapted.base_layer.bias


@pytest.mark.parametrize("size", [6, 5])
@pytest.mark.parametrize("names", [("default",), ("a", "b")])
def test_an_embedding_turns_the_vector_of_every_token(size, names):
    adapted = embedding(names, size)
    adapted.set_scale(names[0], 0.7)
    before, expected = adapted.base_layer.weight.clone(), reference_table(adapted)
    assert not torch.allclose(expected, before, atol=0.1)
    torch.testing.assert_close(expected.norm(dim=1), before.norm(dim=1))
    for call in (adapted, torch.no_grad()(adapted)):
        torch.testing.assert_close(call(TOKENS), expected[TOKENS])
        torch.testing.assert_close(call(torch.tensor(3)), expected[3])
        assert call(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, size)
    unmerged = adapted(TOKENS)
    adapted.merge(safe_merge=True)
    torch.testing.assert_close(adapted.base_layer.weight, expected)
    torch.testing.assert_close(adapted(TOKENS), unmerged, atol=1e-6, rtol=1e-6)
    adapted.unmerge()
    torch.testing.assert_close(adapted.base_layer.weight, before, atol=5e-7, rtol=0)


@pytest.mark.parametrize("size", [6, 5])
@pytest.mark.parametrize("names", [("default",), ("a", "b")])
def test_a_conv1d_is_the_linear_of_the_transposed_weight(size, names):
    adapted, x = conv1d(names, size), inputs(size)
    adapted.set_scale(names[0], 0.7)
    before, expected = adapted.base_layer.weight.clone(), reference_product(adapted, x)
    for call in (adapted, torch.no_grad()(adapted)):
        torch.testing.assert_close(call(x), expected)
    torch.testing.assert_close(adapted.get_angles(), angles(adapted))
    adapted.merge(safe_merge=True)
    assert adapted.base_layer.weight.norm(dim=0).allclose(before.norm(dim=0))  # one column for every output
    torch.testing.assert_close(adapted(x), expected)
    torch.testing.assert_close(adapted.base_layer(x), expected)
    adapted.unmerge()
    torch.testing.assert_close(adapted.base_layer.weight, before, atol=5e-7, rtol=0)


@pytest.mark.parametrize("size", [6, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(size, dtype):
    for adapted, x in ((embedding(size=size, dtype=dtype), TOKENS), (conv1d(size=size, dtype=dtype), inputs(size))):
        x = x if x.dtype == torch.long else x.to(dtype)
        assert not torch.equal(adapted(x), adapted.base_layer(x))
        nn.init.zeros_(adapted.lorad_A["default"])
        for y in (adapted(x), torch.no_grad()(adapted)(x)):
            assert torch.equal(y, adapted.base_layer(x)) and y.dtype == dtype
        assert adapted.lorad_A["default"].dtype == torch.float32


@pytest.mark.parametrize("size", [6, 5])
def test_gradients_equal_autograd_through_the_reference(size):
    adapted = embedding(size=size)
    upstream = torch.randn(*TOKENS.shape, size, generator=torch.Generator().manual_seed(2))
    adapted(TOKENS).backward(upstream)
    A, B = (adapted.__getattr__(f"lorad_{f}")["default"].detach().clone().requires_grad_() for f in "AB")
    rows, paired = adapted.base_layer.weight.detach()[TOKENS.flatten()], 2 * B.shape[1]
    # One token at a time as a Linear with one output, fed with unit vectors.
    turned = [
        reference_lorad_linear(torch.eye(paired), row[None, :paired], None, A[token][None], B)[:, 0]
        for token, row in zip(TOKENS.flatten(), rows)
    ]
    (torch.stack(turned) * upstream.flatten(0, 1)[:, :paired]).sum().backward()
    torch.testing.assert_close(adapted.lorad_A["default"].grad, A.grad)
    torch.testing.assert_close(adapted.lorad_B["default"].grad, B.grad)
    assert not adapted.lorad_A["default"].grad[5].any() and A.grad[4].any()  # 5 was not looked up, 4 was twice


def test_gradients_of_turned_rows_to_second_order():
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 5), (4, 2), (2, 2)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(turned_rows, tensors) and torch.autograd.gradgradcheck(turned_rows, tensors)


def test_only_what_was_looked_up_is_kept_for_the_backward_pass():
    torch.manual_seed(0)
    adapted = LoRaDEmbedding(nn.Embedding(1000, 6), "default", 3, LoRaDConfig(r=3))
    adapted.base_layer.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        adapted(TOKENS)
    assert 0 < sum(t.numel() for t in saved) < 100


def test_padding_sparse_and_frequency_scaling():
    adapted = embedding(padding_idx=4, sparse=True)
    adapted.reset_lorad_parameters("default", identity=False)
    assert not adapted.lorad_A["default"][4].any() and adapted.lorad_A["default"][1].any()
    assert not adapted(TOKENS)[0, 1].any()  # the vector of the padding is zero and stays so
    adapted(TOKENS).square().sum().backward()
    grad = adapted.lorad_A["default"].grad
    assert grad.is_sparse and 4 not in grad.coalesce().indices()
    plain, scaled = embedding(), embedding(scale_grad_by_freq=True)
    for one in (plain, scaled):
        one(TOKENS).sum().backward()
    plain, scaled = (one.lorad_A["default"].grad for one in (plain, scaled))
    torch.testing.assert_close(plain[[4, 1]], 2 * scaled[[4, 1]])
    torch.testing.assert_close(plain[[2, 3]], scaled[[2, 3]])


def test_a_limit_to_the_lengths_and_merging():
    adapted, free = embedding(max_norm=0.5), embedding()
    table = free.base_layer.weight.detach()
    free.base_layer.weight.data = table.renorm(2, 0, 0.5)
    torch.testing.assert_close(adapted(TOKENS), free(TOKENS), atol=1e-6, rtol=1e-5)
    before = adapted.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"max_norm=0.5.*renorm_"):
        adapted.merge()
    assert torch.equal(adapted.base_layer.weight, before) and not adapted.merged
    adapted.base_layer.weight.data.renorm_(2, 0, 0.5)
    adapted.base_layer.max_norm = None
    adapted.merge()
    torch.testing.assert_close(adapted(TOKENS), free(TOKENS), atol=1e-6, rtol=1e-5)


class Scaled(nn.Embedding):
    embed_scale = torch.tensor(3.0)

    def forward(self, x):
        return super().forward(x) * self.embed_scale


def test_an_embedding_that_scales_what_it_looks_up():
    torch.manual_seed(0)
    adapted = filled(LoRaDEmbedding(Scaled(7, 6), "default", 3, LoRaDConfig(r=3)), ("default",))
    expected = 3.0 * reference_table(adapted)[TOKENS]
    torch.testing.assert_close(adapted(TOKENS), expected)
    adapted.merge()
    torch.testing.assert_close(adapted(TOKENS), expected)
    adapted.base_layer.embed_scale = torch.ones(6)
    with pytest.raises(ValueError, match=r"`Scaled` scales each of them.*\(6,\).*exclude_modules"):
        LoRaDEmbedding(adapted.base_layer, "default", 3, LoRaDConfig(r=3))


def test_a_half_precision_table_comes_back_bit_for_bit():
    for adapted, x in ((embedding(dtype=torch.bfloat16), TOKENS), (conv1d(dtype=torch.bfloat16), inputs().bfloat16())):
        before, unmerged = adapted.base_layer.weight.clone(), adapted(x)
        adapted.merge()
        assert not torch.equal(adapted.base_layer.weight, before)
        torch.testing.assert_close(adapted(x), unmerged, atol=2e-2, rtol=2e-2)
        adapted.unmerge()
        assert torch.equal(adapted.base_layer.weight, before)


def test_autocast_leaves_the_lookup_alone_and_lowers_the_product():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        looked_up, product = embedding()(TOKENS), conv1d()(inputs())
    assert torch.equal(looked_up, embedding()(TOKENS)) and product.dtype == torch.bfloat16
    torch.testing.assert_close(product.float(), conv1d()(inputs()), atol=5e-2, rtol=5e-2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.conv1d, self.lin = nn.Embedding(7, 5), Conv1D(8, 5), nn.Linear(8, 2)

    def forward(self, x):
        return self.lin(self.conv1d(self.emb(x)).tanh())


def test_over_a_lora():
    model = Model()
    options = {"target_modules": ["emb", "conv1d"], "init_lora_weights": False, "r": 2}
    model = inject_adapter_in_model(LoraConfig(**options), model, "lora")
    with_lora = model(TOKENS)
    add_adapter(model, LoRaDConfig(r=2, target_modules=["emb", "conv1d"]), "lorad")
    for layer in (model.emb, model.conv1d):
        layer.set_adapter(["lorad"])
    assert torch.equal(model(TOKENS), with_lora)
    fill_adapter(model, "lorad", std=1.0)
    for layer, x in ((model.emb, TOKENS), (model.conv1d, inputs(5))):
        base = layer.get_base_layer()
        own = copy.deepcopy(layer)
        own.base_layer = copy.deepcopy(base)
        torch.testing.assert_close(layer(x), layer.base_layer(x) + own(x) - base(x))
    together = model(TOKENS)
    for layer in (model.emb, model.conv1d):
        layer.base_layer.merge()
        layer.merge()
    torch.testing.assert_close(model(TOKENS), together)


def test_every_sample_with_its_own_adapter():
    model = get_peft_model(Model(), LoRaDConfig(r=2, target_modules=["emb", "conv1d"], init_weights=False), "a")
    model.add_adapter("b", LoRaDConfig(r=3, target_modules=["emb"], init_weights=False))
    model, x = model.eval(), torch.cat([TOKENS, TOKENS[:1]])
    with mixed_adapter_batch(model, ["a", "b", "__base__"]):
        y = model(x)
    with model.disable_adapter():
        expected = [None, None, model(x)[2]]
    for i, name in enumerate("ab"):
        model.set_adapter(name)
        expected[i] = model(x)[i]
    torch.testing.assert_close(y, torch.stack(expected))
    assert not torch.allclose(y[0], y[2]) and not torch.allclose(y[1], model(x)[0])


def test_all_linear_takes_a_conv1d_and_no_embedding_and_counts_agree():
    model = get_peft_model(Model(), LoRaDConfig(r=2, target_modules=["emb", "conv1d", "lin"])).base_model.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == trainable_parameter_count(Model(), ["emb", "conv1d", "lin"], 2) == 2 * (7 + 2 + 8 + 2 + 2 + 4)
    model = inject_adapter_in_model(LoRaDConfig(r=2, target_modules="all-linear"), Model())
    kinds = [type(layer) for layer in (model.emb, model.conv1d, model.lin)]
    assert kinds == [nn.Embedding, LoRaDTransposedLinear, LoRaDLinear]
    inject_adapter_in_model(LoRaDConfig(r=2, target_modules="all-linear"), model, "second")
    assert set(model.conv1d.r) == set(model.lin.r) == {"default", "second"}


def test_trained_tokens_beside_the_adapter(tmp_path):
    config = LoRaDConfig(r=2, target_modules=["conv1d"], trainable_token_indices={"emb": [1, 4]}, init_weights=False)
    model = get_peft_model(Model(), config)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).zero_grad()
    model(TOKENS).square().sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data -= parameter.grad
    moved = (model.emb(torch.arange(7)) - Model().emb.weight).abs().sum(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == [1, 4]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(Model(), tmp_path)
    assert torch.equal(again(TOKENS), model(TOKENS))
    torch.testing.assert_close(again.merge_and_unload()(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    "make, base, message",
    [
        (LoRaDEmbedding, nn.Embedding(4, 1), "`Embedding` has a single one per output"),
        (LoRaDTransposedLinear, Conv1D(4, 1), "`Conv1D` has a single one per output"),
        (LoRaDLinear, nn.Embedding(4, 4), "adapts a Linear, but `Embedding` is a Embedding"),
        (LoRaDEmbedding, nn.Linear(4, 4), "adapts a Embedding, but `Linear` is a Linear"),
        (LoRaDEmbedding, nn.EmbeddingBag(4, 4), "`EmbeddingBag` is a EmbeddingBag.*exclude_modules"),
    ],
)
def test_layers_that_are_refused(make, base, message):
    with pytest.raises(ValueError, match=message):
        make(base, "default", 2, LoRaDConfig(r=2))


def test_deepcopy_and_pickle():
    for adapted, x in ((embedding(("a", "b")), TOKENS), (conv1d(("a", "b")), inputs())):
        for twin in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
            assert torch.equal(twin(x), adapted(x))
