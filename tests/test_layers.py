"""LoRALinear: the layer itself, and what torch does to layers."""

import copy
import io
import math
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from lora_core import ConfigError, LoRALinear, UnsupportedLayerError, inject, merge, scales
from lora_core._layers import adapted_class, factors_of
from lora_core.functional import lora_delta, lora_linear

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Doubled(nn.Linear):
    """A subclass with a forward and an attribute of its own."""

    def __init__(self, *args: int, factor: float = 2.0) -> None:
        super().__init__(*args)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:  # its own name for the input
        return self.factor * super().forward(x)


def trained(layer: nn.Module) -> nn.Module:
    """Fills every factor, as training might."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, p in layer.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=generator))
    return layer


def roundtrip_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def roundtrip_old_pickle(layer: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(layer, protocol=2))


def roundtrip_torch(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, roundtrip_pickle, roundtrip_old_pickle, roundtrip_torch]


@given(
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(1, 6),
    st.integers(1, 6),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.booleans(),
)
def test_fresh_layer_is_its_base_bit_for_bit(lead, i, o, dtype, bias, training):
    linear = nn.Linear(i, o, bias=bias, dtype=dtype).train(training)
    x = torch.randn(*lead, i).to(dtype)
    expected = linear(x)
    layer = LoRALinear(linear, rank=1, alpha=3.0)
    got = layer(x)
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    assert layer.training is training


@given(
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(-4, 4, width=16).filter(bool),
    st.booleans(),
)
def test_trained_layer_is_the_written_out_formula(lead, i, o, alpha, bias):
    rank = min(i, o)
    layer = trained(LoRALinear(nn.Linear(i, o, bias=bias).double(), rank=rank, alpha=alpha))
    x = torch.randn(*lead, i).double()
    A, B = layer.lora_A_default, layer.lora_B_default
    expected = x @ layer.weight.T + (alpha / rank) * (x @ A.T) @ B.T
    assert_close(layer(x), expected if layer.bias is None else expected + layer.bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_input_is_read_right(dtype):
    layer = trained(LoRALinear(nn.Linear(4, 3, dtype=dtype), rank=2))
    x = torch.randn(4, 5).to(dtype).T
    assert not x.is_contiguous()
    assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("rank", [1, 4])
def test_every_rank_up_to_the_smaller_side_is_taken(rank):
    layer = LoRALinear(nn.Linear(4, 6), rank=rank)
    assert layer.lora_A_default.shape == (rank, 4)
    assert layer.lora_B_default.shape == (6, rank)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "`rank` must be at least 1, but is 0."),
        (-3, "`rank` must be at least 1, but is -3."),
        (5, "`rank` must be at most min(in_features, out_features) = 4, but is 5."),
        (2.0, "`rank` must be a whole number, but is 2.0."),
        (True, "`rank` must be a whole number, but is True."),
        ("4", "`rank` must be a whole number, but is '4'."),
        (None, "`rank` must be a whole number, but is None."),
    ],
)
def test_rank_out_of_bounds_is_refused(rank, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        LoRALinear(nn.Linear(4, 6), rank=rank)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, "1", True, 10**400, 1j])
def test_alpha_must_be_finite(alpha):
    message = f"`alpha` must be a finite number, but is {alpha!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        LoRALinear(nn.Linear(4, 6), alpha=alpha)


def test_an_alpha_of_zero_could_have_no_effect_and_is_refused():
    message = (
        "`alpha` must not be 0, but is 0.0: the adapter could have no effect and no gradient."
        " Use `scales` to turn an adapter off."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        LoRALinear(nn.Linear(4, 6), alpha=0.0)
    model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(ConfigError, match=r"^`alpha` must not be 0, but is 0 at '0': the adapter"):
        inject(model, rank=2, targets="0", rules={"0": {"alpha": 0}})


@pytest.mark.parametrize("kind", ["int64", "uint8"])
def test_any_whole_number_is_a_rank(kind):
    numpy = pytest.importorskip("numpy")
    layer = LoRALinear(nn.Linear(4, 6), rank=getattr(numpy, kind)(2))
    assert type(layer.lora_state.configs["default"].rank) is int
    assert layer.lora_A_default.shape == (2, 4)


def test_a_float8_host_is_refused_with_the_repair():
    model = nn.Sequential(nn.Linear(4, 4).to(torch.float8_e4m3fn))
    said = "has a weight of torch.float8_e4m3fn, which nothing but a cast can take. Cast the layer"
    with pytest.raises(UnsupportedLayerError, match=f"{re.escape(said)} to 16 bits or more"):
        LoRALinear(model[0])
    with pytest.raises(UnsupportedLayerError, match=f"{re.escape(said)} to 16 bits or more"):
        inject(model, targets="0")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dropout", [1, 1.0, -0.1, math.nan, "0", True, None])
def test_dropout_must_be_a_probability_below_one(dropout):
    message = f"`dropout` must be in [0, 1), but is {dropout!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        LoRALinear(nn.Linear(4, 6), dropout=dropout)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, "float32"])
def test_dtype_must_be_trainable(dtype):
    message = f"`dtype` must be a floating type of 16 bits or more, but is {dtype!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)} Use torch.float32, "):
        LoRALinear(nn.Linear(4, 6), dtype=dtype)


@pytest.mark.parametrize("name", ["", "a.b", "../x", "/etc/x", "a\n", "x" * 65, "é", 3, "a b"])
def test_an_adapters_name_is_no_path(name):
    rule = "`name` must be 1 to 64 letters, digits, '_' or '-'"
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{rule}, but is {name!a}.')}$"):
        LoRALinear(nn.Linear(4, 6), name=name)


def test_a_refused_setting_leaves_the_linear_trainable():
    linear = nn.Linear(4, 6)
    for wrong in ({"rank": 9}, {"alpha": math.nan}, {"name": "a.b"}, {"dropout": 2.0}):
        with pytest.raises(ConfigError):
            LoRALinear(linear, **wrong)
    assert all(p.requires_grad for p in linear.parameters())


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1.0, 0.5), (-3, -1.5)])
def test_scale_is_alpha_over_rank(alpha, scale):
    layer = trained(LoRALinear(nn.Linear(4, 6).double(), rank=2, alpha=alpha))
    assert layer.lora_state.configs["default"].scale == scale
    dense = lora_delta(*factors_of(layer, "default"), scale)
    assert_close(layer(torch.eye(4).double()) - layer.bias, (layer.weight + dense).T)


@given(
    st.integers(1, 6), st.integers(1, 6), st.floats(-4, 4, width=16).filter(bool), st.integers(1, 6)
)
def test_rank_stabilised_it_divides_alpha_by_the_square_root_of_the_rank(i, o, alpha, rank):
    rank = min(rank, i, o)
    layer = trained(LoRALinear(nn.Linear(i, o).double(), rank, alpha, rslora=True))
    config, x = layer.lora_state.configs["default"], torch.randn(5, i).double()
    assert config.scale == alpha / math.sqrt(rank)
    A, B = factors_of(layer, "default")
    expected = x @ layer.weight.T + layer.bias + alpha / rank**0.5 * (x @ A.T @ B.T)
    assert_close(layer(x), expected)
    merge(layer.eval())
    assert_close(layer(x), expected)
    plain = trained(LoRALinear(nn.Linear(i, o), rank, alpha)).lora_state.configs["default"]
    assert config.scale == pytest.approx(plain.scale * math.sqrt(rank), rel=1e-15)


@pytest.mark.parametrize("rslora", [1, 0, None, "yes", torch.tensor(True)], ids=str)
def test_rslora_must_be_a_boolean(rslora):
    linear = nn.Linear(4, 4)
    message = f"`rslora` must be True or False, but is {rslora!a}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        LoRALinear(linear, rslora=rslora)
    assert all(p.requires_grad for p in linear.parameters())


def test_alpha_left_out_is_the_rank():
    assert LoRALinear(nn.Linear(8, 8), rank=3).lora_state.configs["default"].alpha == 3.0


def test_it_adopts_the_very_parameters():
    linear = nn.Linear(4, 6)
    layer = LoRALinear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (4, 6)
    assert LoRALinear(nn.Linear(4, 6, bias=False)).bias is None


def test_only_the_adapter_trains():
    layer = LoRALinear(nn.Linear(4, 6))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "lora_A_default",
        "lora_B_default",
    ]
    layer(torch.randn(5, 4)).square().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    # lora_B starts at zero, so the first gradient reaches lora_B alone
    assert layer.lora_B_default.grad.abs().min() > 0
    assert torch.equal(layer.lora_A_default.grad, torch.zeros(4, 4))


def test_one_step_moves_the_output_and_not_the_base():
    layer = LoRALinear(nn.Linear(4, 6))
    x, before = torch.randn(5, 4), layer.weight.clone()
    first = layer(x).detach()
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(x).square().sum().backward()
    optimiser.step()
    assert torch.equal(layer.weight, before)
    assert (layer(x) - first).abs().max() > 1e-3


def test_the_first_factor_starts_uniform_within_kaimings_bound():
    layer = LoRALinear(nn.Linear(400, 300), rank=100)
    A, bound = layer.lora_A_default, 1 / math.sqrt(400)
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.99 * bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(layer.lora_B_default, torch.zeros(300, 100))


@pytest.mark.parametrize(
    ("base", "wish", "stored"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_factors_are_float32_at_least_unless_told(base, wish, stored):
    layer = trained(LoRALinear(nn.Linear(4, 6, dtype=base), rank=2, dtype=wish))
    assert layer.lora_A_default.dtype == layer.lora_B_default.dtype == stored
    x = torch.randn(3, 4).to(base)
    out = layer(x)
    assert out.dtype == base
    out.float().sum().backward()
    assert layer.lora_A_default.grad.dtype == stored


def test_a_bfloat16_layer_is_near_its_float64_self():
    layer = trained(LoRALinear(nn.Linear(16, 8, dtype=torch.bfloat16), rank=2))
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    A, B = (p.double() for p in factors_of(layer, "default"))
    exact = lora_linear(x.double(), layer.weight.double(), layer.bias.double(), A, B)
    assert_close(layer(x).double(), exact, atol=0.15, rtol=0.03)


def test_dropout_is_for_training_alone():
    layer = trained(LoRALinear(nn.Linear(8, 8), rank=2, dropout=0.5))
    x = torch.randn(4, 8)
    exact = lora_linear(x, layer.weight, layer.bias, *factors_of(layer, "default"))
    layer.eval()
    assert_close(layer(x), exact)
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)


def test_dropout_does_not_touch_the_base():
    layer = LoRALinear(nn.Linear(8, 8), rank=2, dropout=0.5).train()
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: Doubled(4, 6)])
def test_a_copy_computes_the_same_and_shares_nothing(make, duplicate):
    model = nn.Sequential(make())
    inject(model, rank=2, alpha=3.0, targets="0", name="style")
    layer = trained(model)[0]
    scales(model, style=0.7)
    x = torch.randn(3, 4)
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in layer.named_parameters()
    ]
    with torch.no_grad():
        twin.lora_B_style.add_(1)
    assert not torch.equal(twin(x), layer(x))
    scales(twin, style=0.0)
    assert layer.lora_state.selection.strengths == (0.7,)


def test_a_copied_model_can_be_ejected_by_itself(net, x, perturb):
    from lora_core import eject

    plain = net(x)
    inject(net)
    perturb(net)
    adapted = net(x)
    twin = copy.deepcopy(net)
    eject(twin)
    assert torch.equal(twin(x), plain)
    assert all(p.requires_grad for p in twin.parameters())
    assert torch.equal(net(x), adapted)


def test_state_dict_keeps_the_hosts_keys_and_adds_flat_ones():
    linear = nn.Linear(4, 6)
    before = list(linear.state_dict())
    layer = trained(LoRALinear(linear, name="a-1"))
    assert list(layer.state_dict()) == [*before, "lora_A_a-1", "lora_B_a-1"]
    other = LoRALinear(nn.Linear(4, 6), name="a-1")
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(other(x), layer(x))
    missing, unexpected = other.load_state_dict(nn.Linear(4, 6).state_dict(), strict=False)
    assert (missing, unexpected) == (["lora_A_a-1", "lora_B_a-1"], [])


def test_loading_with_assign_keeps_what_trains():
    layer, other = trained(LoRALinear(nn.Linear(4, 6))), LoRALinear(nn.Linear(4, 6))
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 4)
    assert torch.equal(other(x), layer(x))
    assert [p.requires_grad for p in other.parameters()] == [False, False, True, True]


def test_functional_call_uses_the_tensors_it_is_given():
    layer = trained(LoRALinear(nn.Linear(4, 6), rank=2))
    x = torch.randn(3, 4)
    swapped = {n: torch.randn_like(p) for n, p in layer.named_parameters()}
    expected = lora_linear(
        x,
        swapped["weight"],
        swapped["bias"],
        swapped["lora_A_default"],
        swapped["lora_B_default"],
    )
    assert_close(torch.func.functional_call(layer, swapped, (x,)), expected)


def test_per_sample_gradients_by_vmap_are_the_loops():
    layer = trained(LoRALinear(nn.Linear(4, 6).double(), rank=2))
    x = torch.randn(5, 4).double()
    names = ["lora_A_default", "lora_B_default"]
    values = {n: getattr(layer, n).detach() for n in names}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, values, (sample,)).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for row in range(5):
        expected = torch.autograd.grad(
            layer(x[row]).square().sum(), [getattr(layer, n) for n in names]
        )
        for name, gradient in zip(names, expected, strict=True):
            assert_close(got[name][row], gradient)
            assert gradient.abs().max() > 0


def test_stacked_module_state_runs_as_an_ensemble():
    layers = [LoRALinear(nn.Linear(4, 6), rank=2) for _ in range(3)]
    for n, layer in enumerate(layers):
        nn.init.constant_(layer.lora_B_default, n + 1.0)
    params, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(5, 4)

    def call(params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layers[0], (params, buffers), (x,))

    assert_close(torch.vmap(call)(params, buffers), torch.stack([layer(x) for layer in layers]))


@pytest.mark.slow
def test_compiled_fullgraph_it_computes_the_same_and_a_new_scale_recompiles_nothing(
    net, x, perturb
):
    from torch._dynamo.testing import CompileCounter

    inject(net, rank=2, name="style")
    perturb(net)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for strength in (1.0, 0.5, -2.0):
        scales(net, style=strength)
        net.zero_grad()
        out = compiled(x)
        assert_close(out, net(x))
        out.square().sum().backward()
        assert net.blocks[0].attn.to_q.lora_A_style.grad.abs().max() > 0
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_autocast_gives_bfloat16_out_and_float32_gradients():
    layer = trained(LoRALinear(nn.Linear(8, 6), rank=2))
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), layer(x), atol=0.1, rtol=0.05)
    out.float().sum().backward()
    for p in factors_of(layer, "default"):
        assert p.grad.dtype == torch.float32
        assert p.grad.abs().max() > 0


def test_hooks_see_the_adapted_output():
    layer = nn.Sequential(nn.Linear(4, 6))
    seen: list[Tensor] = []
    layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer[0].register_forward_hook(lambda module, args, out: seen.append(out))
    inject(layer, targets="0")
    trained(layer)
    x = torch.randn(3, 4)
    out = layer(x)
    assert seen[0] is x
    assert seen[1] is out
    assert not torch.equal(out, nn.functional.linear(x, layer[0].weight, layer[0].bias))


def test_a_subclass_keeps_its_own_forward_and_attributes():
    layer = Doubled(4, 6, factor=3.0)
    x = torch.randn(5, 4)
    plain = layer(x)
    inject(layer, rank=2, targets=Doubled)
    assert isinstance(layer, Doubled)
    assert type(layer).__name__ == "LoRAReadDoubled"
    assert type(layer) is adapted_class(Doubled, read=True)
    assert layer.factor == 3.0
    assert torch.equal(layer(x), plain)
    trained(layer)
    assert_close(layer(x), plain + 3 * x @ layer.lora_A_default.T @ layer.lora_B_default.T)


def test_the_door_takes_plain_linears_alone():
    rule = "`linear` must be a plain nn.Linear, but is "
    for other in (Doubled(4, 6), LoRALinear(nn.Linear(4, 6)), nn.Conv2d(3, 3, 1)):
        message = f"{rule}{type(other).__name__}."
        with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(message)} Use `inject"):
            LoRALinear(other)


def test_the_door_refuses_a_linear_whose_forward_was_patched():
    linear = nn.Linear(4, 6)
    linear.forward = lambda x: x
    message = "`linear` must be adaptable, but has a `forward` patched onto the instance"
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(message)} "):
        LoRALinear(linear)


def test_to_float64_takes_everything_along():
    layer = trained(LoRALinear(nn.Linear(4, 6), rank=3, alpha=1.0))
    x = torch.randn(5, 4)
    narrow = layer(x)
    assert layer.to(torch.float64) is layer
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    wide = layer(x.double())
    assert_close(wide.float(), narrow)
    # the scale is a third, which float32 would have rounded
    A, B = factors_of(layer, "default")
    exact = lora_linear(x.double(), layer.weight, layer.bias, A, B, 1 / 3)
    assert_close(wide, exact, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("swap", [False, True])
def test_halving_keeps_what_trains(swap):
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer = LoRALinear(nn.Linear(4, 6)).bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert [p.requires_grad for p in layer.parameters()] == [False, False, True, True]
    assert layer(torch.randn(3, 4).bfloat16()).dtype == torch.bfloat16


def test_from_meta_to_memory_keeps_the_right_gain():
    with torch.device("meta"):
        layer = LoRALinear(nn.Linear(4, 6), rank=2, alpha=5.0)
    scales(layer, default=0.5)
    assert layer.lora_A_default.is_meta
    layer.to_empty(device="cpu")
    assert [term.gain.item() for term in layer.lora_state.selection.bank] == [1.25]
    source = trained(LoRALinear(nn.Linear(4, 6), rank=2, alpha=5.0))
    scales(source, default=0.5)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(layer(x), source(x))


def test_made_in_inference_mode_it_still_trains():
    linear = nn.Linear(4, 6)
    with torch.inference_mode():
        layer = LoRALinear(linear)
        scales(layer, default=0.5)
    layer(torch.randn(3, 4)).sum().backward()
    assert layer.lora_B_default.grad.abs().max() > 0


def test_it_prints_its_adapters():
    layer = LoRALinear(nn.Linear(4, 6), rank=2, alpha=3, name="style")
    text = "in_features=4, out_features=6, bias=True, style: rank=2, alpha=3"
    assert repr(layer) == f"LoRALinear({text})"
    stabilised = LoRALinear(nn.Linear(4, 6), rank=2, alpha=3, name="style", rslora=True)
    assert repr(stabilised) == f"LoRALinear({text}, rslora)"


def test_checkpointed_gradients_are_the_plain_ones():
    from torch.utils.checkpoint import checkpoint

    layer = trained(LoRALinear(nn.Linear(4, 6), rank=2))
    x = torch.randn(3, 4)
    layer(x).square().sum().backward()
    plain = [p.grad.clone() for p in factors_of(layer, "default")]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for p, gradient in zip(factors_of(layer, "default"), plain, strict=True):
        assert_close(p.grad, gradient)
