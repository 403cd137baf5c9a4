"""A DoRA layer is its host with another weight, whose rows have the lengths that they are given."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import lora_core
from lora_core import functional, parameters, scales
from lora_core._layers import kind
from tests.laws.zoo import Conv1D, Model, indices, pictures, vectors


def linear(lora_A, lora_B):
    return lora_B @ lora_A


def kernels(lora_A, lora_B):
    return torch.einsum("or...,ri...->oi...", lora_B.flatten(1), lora_A)


def cores(lora_A, lora_B, lora_mid):
    return torch.einsum("or,rs...,si->oi...", lora_B.flatten(1), lora_mid, lora_A.flatten(1))


def flat(weight):
    return weight.flatten(1)


def table(weight):
    return weight.T


# host, settings, inputs, its dense update as a matrix's rows or kernels, and its weight as rows
ROWS = {
    "linear": (lambda: nn.Linear(8, 6), {}, vectors, linear, flat),
    "linear-rslora": (lambda: nn.Linear(8, 6, bias=False), {"rslora": True}, vectors, linear, flat),
    "gpt2-conv1d": (lambda: Conv1D(6, 8), {}, vectors, linear, table),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), {}, pictures(7), kernels, flat),
    "conv2d-in-groups": (
        lambda: nn.Conv2d(4, 6, (3, 2), groups=2, padding=1, padding_mode="circular"),
        {},
        pictures(7, 6),
        kernels,
        flat,
    ),
    "conv2d-tucker": (lambda: nn.Conv2d(4, 6, 3), {"tucker": True}, pictures(7, 6), cores, flat),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), {}, pictures(4, 3, 3), kernels, flat),
    "embedding": (lambda: nn.Embedding(9, 6, padding_idx=0), {}, indices, linear, table),
}


@pytest.fixture(params=ROWS)
def row(request):
    return ROWS[request.param]


def adapted(row):
    """A model in float64 with factors and lengths far from where they start."""
    build, settings, inputs, *_ = row
    torch.manual_seed(0)
    model = Model(build()).double()
    lora_core.inject(model, rank=2, alpha=3.0, targets="site", dora=True, **settings)
    for p in parameters(model):
        p.data.normal_()
    with torch.no_grad():
        model.site.lora_magnitude_default.abs_().add_(0.5)
        if isinstance(model.site, nn.Embedding):
            model.site.lora_A_default[:, 0] = 0
    x = inputs(3)
    return model, x.double() if x.is_floating_point() else x


def by_hand(row, model, x, strength):
    """The output by the dense formula, from a model's tensors and the forward of its host."""
    _, settings, _, update, rows = row
    bare = copy.deepcopy(model)
    lora_core.eject(bare)
    site, W = model.site, bare.site.weight.detach()
    parts = {n: getattr(site, f"{n}_default") for n in ("lora_A", "lora_B")}
    if "tucker" in settings:
        parts["lora_mid"] = site.lora_mid_default
    scale = 3.0 / (2**0.5 if "rslora" in settings else 2)
    W = rows(W)
    V = W + strength * scale * update(**parts).reshape(W.shape)
    lengths = (1 - strength) * W.norm(dim=1) + strength * site.lora_magnitude_default
    V = V * (lengths / V.norm(dim=1).detach())[:, None]
    weight = rows(V) if rows is table else V.view(bare.site.weight.shape)
    return torch.func.functional_call(bare, {"site.weight": weight}, (x,))


@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("training", [False, True])
def test_the_output_and_every_gradient_are_those_of_the_dense_formula(row, strength, training):
    model, x = adapted(row)
    scales(model.train(training), default=strength)
    got, expected = model(x), by_hand(row, model, x, strength)
    assert_close(got, expected)
    with torch.no_grad():
        assert_close(model(x), expected)
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), parameters(model)),
        torch.autograd.grad(expected.square().sum(), parameters(model)),
        strict=True,
    ):
        assert theirs.abs().max() > 0
        assert_close(mine, theirs)


def test_the_merged_weight_is_that_of_the_dense_formula(row):
    model, x = adapted(row)
    expected = by_hand(row, model, x, 1.0)
    lora_core.merge(model.eval())
    assert_close(model(x), expected)


CHANGES = {
    "in place": lambda p: p.detach().copy_(p.flip(0)),
    "unversioned": lambda p: p.data.copy_(p.flip(0)),
    "its memory": lambda p: setattr(p, "data", p.detach().flip(0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_remembered_follows_a_change_of_any_part(row, change):
    model, x = adapted(row)
    names = [n for n, _ in model.site.named_parameters() if n != "bias"]
    for name in names:
        before = model(x)
        change(model.site.get_parameter(name))
        after = model(x)
        assert not torch.allclose(after, before)
        assert_close(after, by_hand(row, model, x, 1.0))


def test_what_is_remembered_is_not_taken_for_that_of_new_contents(row):
    model, x = adapted(row)
    other, _ = adapted(row)
    for p in other.parameters():
        p.data = p.data.flip(0)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            model(x)
            model.load_state_dict(other.state_dict())
            assert_close(model(x), by_hand(row, other, x, 1.0))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_no_memory_is_kept_from_being_freed():
    model, x = adapted(ROWS["linear"])
    model(x)
    storage = torch.multiprocessing.reductions.StorageWeakRef(model.site.weight.untyped_storage())
    model.to("meta")
    assert storage.expired()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_sharded_layer_learns_as_a_whole_one_does():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        whole, x = adapted(ROWS["linear"])
        sharded, _ = adapted(ROWS["linear"])
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(sharded.site, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for _ in range(3):
            outputs = []
            for model in (whole, sharded):
                y = model(x)
                y.square().sum().backward()
                torch.optim.SGD(parameters(model), 0.01).step()
                model.zero_grad()
                outputs.append(y.detach())
            assert_close(*outputs)
    finally:
        torch.distributed.destroy_process_group()


def test_lengths_that_another_thread_changed_meanwhile_are_not_remembered(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 6))
    lora_core.inject(model, targets="0", rank=2, dora=True)
    lora_core.parameters(model)[1].data.normal_()
    x, layer = torch.randn(3, 6), model[0]
    scales(model, default=0.5)  # where the lengths of the bare weight count
    expected = model(x)
    norm, own, other = functional.dora_norm, layer.weight.data, 3 * layer.weight.data

    def amid_a_change(*args):
        """The lengths of another weight, which has gone when they are there, as after `unmerge`."""
        kind.swap(layer.weight, other)
        found = norm(*args)
        kind.swap(layer.weight, own)
        return found

    kind.swap(layer.weight, own.clone())  # what is remembered holds no more
    with monkeypatch.context() as patch:
        patch.setattr(functional, "dora_norm", amid_a_change)
        model(x)
    assert torch.equal(model(x), expected)
