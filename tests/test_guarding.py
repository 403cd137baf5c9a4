"""What stands above adapted layers: nothing passes them by, nothing is half loaded."""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lora_core import (
    AdapterError,
    LoRALinear,
    MergeError,
    UnsupportedLayerError,
    eject,
    inject,
    load,
    merge,
    parameters,
    save,
    unmerge,
)
from lora_core._injection import guards, rollback
from lora_core._layers import delta_of
from lora_core.testing import check_lora

# -- state dicts


def pictures(model: nn.Module) -> list[tuple[int, Tensor]]:
    return [(id(p), p.detach().clone()) for p in model.parameters()]


def assert_same(model: nn.Module, before: list[tuple[int, Tensor]]) -> None:
    for (key, values), (seen, now) in zip(before, pictures(model), strict=True):
        assert key == seen
        assert torch.equal(values, now)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("part", ["", "blocks", "blocks.0"])
def test_a_merged_models_state_dict_is_refused_before_anything_is_copied(
    make_net, perturb, strict, assign, part
):
    source, target = make_net(), make_net()
    for model in (source, target):
        inject(model)
    perturb(source)
    merge(source)
    with torch.no_grad():  # the norm comes before the first adapted layer
        source.blocks[0].norm.weight.add_(1)
    target = target.get_submodule(part)
    state, before = source.get_submodule(part).state_dict(), pictures(target)
    name = "blocks.0.attn.to_q".removeprefix(part).lstrip(".")
    said = (
        "A state dict must be saved and loaded unmerged, but the state dict is merged at"
        f" {name!r}: an update could be lost or applied twice."
        " Call `unmerge(model)` before `state_dict()`."
    )
    with pytest.raises(MergeError, match=f"^{re.escape(said)}$"):
        target.load_state_dict(state, strict=strict, assign=assign)
    assert_same(target, before)


def test_nothing_is_copied_into_a_merged_model(net, make_net, perturb):
    inject(net, targets="blocks.1.attn.to_v")
    perturb(net)
    merge(net)
    before = pictures(net)
    said = "A state dict must be saved and loaded unmerged, but the model is merged at"
    with pytest.raises(MergeError, match=f"^{re.escape(said)} 'blocks.1.attn.to_v'"):
        net.load_state_dict({k: t + 1 for k, t in make_net().state_dict().items()}, strict=False)
    assert_same(net, before)
    unmerge(net)
    net.load_state_dict(make_net(blocks=2).state_dict(), strict=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_guarded_too_and_ejects_without_trace(net, portrait, duplicate):
    before = portrait(net)
    inject(net)
    twin = duplicate(net)
    merge(net)
    held = pictures(twin)
    with pytest.raises(MergeError, match="^A state dict must be saved and loaded unmerged"):
        twin.load_state_dict(net.state_dict())
    assert_same(twin, held)
    unmerge(net)
    for model in (net, twin):
        eject(model)
        assert not any(m._load_state_dict_pre_hooks for m in model.modules())
    assert portrait(net) == before


def test_a_loaded_adapter_is_guarded_as_an_injected_one_is(net, make_net, tmp_path):
    inject(net)
    save(net, tmp_path / "a")
    bare = make_net()
    load(bare, tmp_path / "a")
    merge(net)
    held = pictures(bare)
    with pytest.raises(MergeError, match="^A state dict must be saved and loaded unmerged"):
        bare.load_state_dict(net.state_dict())
    assert_same(bare, held)


def test_guards_stay_while_an_adapter_stays(net):
    inject(net, name="a")
    inject(net, name="b", targets="head")
    eject(net, "a")
    assert [n for n, m in net.named_modules() if m._load_state_dict_pre_hooks] == [""]
    eject(net, "b")
    assert not net._load_state_dict_pre_hooks


def test_a_users_own_hook_stays(net):
    calls: list[int] = []
    handle = net.register_load_state_dict_pre_hook(lambda *_: calls.append(1))
    inject(net)
    eject(net)
    net.load_state_dict(net.state_dict())
    assert calls == [1]
    handle.remove()
    assert not net._load_state_dict_pre_hooks


# -- torch's fused encoder

PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]).bool()


def encoder(**options: object) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.fixture
def src() -> Tensor:
    """An input for the encoder, (batch, tokens, dim)."""
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("norm", ["before", "after"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_adapter_in_an_encoder_layer_takes_effect_in_every_mode(
    src, padding, training, gradients, norm, portrait
):
    model = encoder(norm_first=norm == "before")
    there = torch.ones(3, 5).bool() if padding is None else ~padding
    oracle, before = copy.deepcopy(model), portrait(model)
    with torch.no_grad():
        plain = model(src, src_key_padding_mask=padding)
    inject(model, rank=2, targets=["linear1", "linear2"])
    with torch.no_grad():
        assert_close(model(src, src_key_padding_mask=padding)[there], plain[there])
        for p in parameters(model):
            p.normal_(std=0.3)
        for mine, bare in zip(model.layers, oracle.layers, strict=True):
            bare.linear1.weight += delta_of(mine.linear1)
            bare.linear2.weight += delta_of(mine.linear2)
    for m in (model, oracle):
        m.train(training)
    with torch.set_grad_enabled(gradients):
        out = model(src, src_key_padding_mask=padding)[there]
        assert_close(out, oracle(src, src_key_padding_mask=padding)[there])
    assert (out - plain[there]).abs().max() > 0.1
    eject(model.eval())
    assert portrait(model) == before
    with torch.no_grad():
        assert torch.equal(model(src, src_key_padding_mask=padding), plain)


def test_an_encoder_passes_the_laws(src):
    assert len(check_lora(encoder(), src, rank=2, targets="linear?").layers) == 4


def test_only_the_encoder_layer_that_holds_an_adapter_leaves_the_fused_path():
    model = encoder()
    inject(model, rank=2, targets="layers.1.linear1")
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 0]
    assert not model.use_nested_tensor
    eject(model)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 1]
    assert model.use_nested_tensor


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
def test_a_layer_placed_by_hand_in_an_encoder_layer_takes_effect(src, padding):
    model = encoder().requires_grad_(False)
    there = torch.ones(3, 5).bool() if padding is None else ~padding
    with torch.no_grad():
        plain = model(src, src_key_padding_mask=padding)
        for layer in model.layers:
            layer.linear1 = LoRALinear(layer.linear1, rank=2)
            layer.linear1.lora_B_default.normal_()
        fused = model(src, src_key_padding_mask=padding)
        stepwise = model.train()(src, src_key_padding_mask=padding)
    assert_close(fused[there], stepwise[there])
    assert (fused - plain)[there].abs().max() > 0.1
    eject(model)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_placed_by_hand_where_nothing_calls_it_is_no_layer_to_train():
    model = encoder()
    model.layers[1].self_attn.out_proj = LoRALinear(nn.Linear(8, 8))
    said = (
        "An adapted layer must be called to train, but 'layers.1.self_attn.out_proj' is not:"
        " nn.MultiheadAttention reads its weight itself."
    )
    with pytest.raises(UnsupportedLayerError, match=f"^{re.escape(said)} Put the plain layer"):
        parameters(model)


def test_a_failure_while_guarding_undoes_the_whole_injection(
    portrait, monkeypatch: pytest.MonkeyPatch
):
    model = encoder()
    before, real = portrait(model), guards.settle
    calls: list[int] = []

    def failing(root: nn.Module) -> None:
        real(root)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(rollback, "settle", failing)
    verb: Callable[..., object] = inject
    with pytest.raises(KeyboardInterrupt):
        verb(model, rank=2, targets="linear1")
    assert portrait(model) == before
    assert model.use_nested_tensor


def single() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()


HOLDERS: dict[str, Callable[[nn.TransformerEncoderLayer], list[nn.Module]]] = {
    "the layer itself": lambda e: [e.linear1],
    "a list": lambda e: [nn.ModuleList([e.linear1, e.linear2])],
    "a list in a dict": lambda e: [nn.ModuleDict({"a": nn.ModuleList([e.linear1])})],
    "a sequence": lambda e: [nn.Sequential(e.linear1, e.linear2)],
    "one after the other": lambda e: [e.linear1, e.linear2],
}


@pytest.mark.parametrize("how", HOLDERS)
def test_an_adapter_put_below_an_encoder_layer_takes_effect_in_eval(src, how, portrait):
    model = single()
    before = portrait(model)
    with torch.no_grad():
        plain = model(src)
    roots = HOLDERS[how](model)
    for root in roots:
        inject(root, rank=2, targets=nn.Linear)
    with torch.no_grad():
        for p in parameters(model):
            p.normal_()
        fused, stepwise = model(src), model.train()(src)
    assert_close(fused, stepwise)
    assert (fused - plain).abs().max() > 0.1
    for root in roots:
        eject(root)
    assert portrait(model.eval()) == before


def test_a_loaded_adapter_below_an_encoder_layer_takes_effect_in_eval(src, tmp_path):
    source, model = single(), single()
    inject(source.linear1, rank=2, targets=nn.Linear)
    with torch.no_grad():
        for p in parameters(source):
            p.normal_()
        save(source.linear1, tmp_path / "a")
        load(model.linear1, tmp_path / "a")
        assert torch.equal(model(src), source(src))
        assert_close(model(src), model.train()(src))


def test_a_layer_that_a_seen_module_calls_has_no_hook(net):
    inject(net, targets=nn.Linear)
    assert not any(m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("freeze", [True, False])
def test_what_stands_above_layers_ejected_one_by_one_comes_back_with_the_whole(portrait, freeze):
    model = encoder()
    before = portrait(model)
    inject(model, rank=2, targets="linear1", freeze=freeze)
    for layer in model.layers:
        eject(layer.linear1)
    eject(model)
    assert portrait(model) == before
    with pytest.raises(AdapterError, match="^The model must have an adapter, but this"):
        eject(model)


def test_what_is_left_above_a_part_ejected_by_name_goes_by_name_too():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    nested = model.use_nested_tensor
    inject(model, rank=2, targets="linear1", name="a")
    eject(model.layers, "a")
    eject(model, "a")
    assert model.use_nested_tensor is nested
    assert not [key for module in model.modules() for key in vars(module) if "lora" in key]
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
