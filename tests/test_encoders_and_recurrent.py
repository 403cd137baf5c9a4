"""Whole encoders and recurrent layers: torch has several paths for each; all see adapters."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import lora_core
from lora_core._layers import LoRAMixin, factors_of

WAYS = list(itertools.product((True, False), repeat=2))  # training, gradients
PARTS = {
    "packed": ["in_proj_weight"],
    "parts": ["q_proj_weight", "v_proj_weight"],
    "out": ["out_proj"],
    "feed-forward": ["linear1", "linear2"],
    "all": ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj", "linear1", "linear2"],
}
LENGTHS = torch.tensor([5, 2, 3])
PADDED = torch.arange(5) >= LENGTHS[:, None]  # (3, 5)


@pytest.fixture(params=[True, False], ids=["nested", "padded"])
def nested(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["norm-first", "norm-last"])
def norm_first(request):
    return request.param


@pytest.fixture(params=PARTS.values(), ids=PARTS)
def targets(request):
    return request.param


def encoder(norm_first=False, nested=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    nested = nested and not norm_first  # or torch warns that it will not
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


def trained(model, targets):
    lora_core.inject(model, rank=2, alpha=3.0, targets=targets)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora_core.parameters(model):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def sequences():
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))


def in_every_way(model, call):
    """What a call gives in training and evaluation, with gradients and without."""
    found = {}
    for training, gradients in WAYS:
        with torch.set_grad_enabled(gradients):
            found[training, gradients] = call(model.train(training)).detach()
    model.eval()
    return found


def merged(model):
    twin = copy.deepcopy(model)
    lora_core.merge(twin, reversible=False)
    lora_core.eject(twin)
    return twin


# it says that its nested tensors are a prototype
prototype = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@prototype
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "training too"])
def test_an_encoder_gives_what_the_merged_one_gives_in_every_mode(
    targets, norm_first, nested, frozen
):
    bare = encoder(norm_first, nested)
    model, x = trained(copy.deepcopy(bare), targets), sequences()
    if not frozen:
        model.requires_grad_()
    plain = merged(model)

    def call(model):
        return model(x, src_key_padding_mask=PADDED)

    expected, without = in_every_way(plain, call), in_every_way(bare, call)
    for way, y in in_every_way(model, call).items():
        assert_close(y[~PADDED], expected[way][~PADDED])
        assert (y - without[way])[~PADDED].abs().max() > 0.05
        with lora_core.disabled(model):
            training, gradients = way
            with torch.set_grad_enabled(gradients):
                base = call(model.train(training))
        assert_close(base[~PADDED], without[way][~PADDED])


@prototype
def test_what_is_padded_matters_to_no_other_position(targets, norm_first, nested):
    model, x = trained(encoder(norm_first, nested), targets), sequences()
    other = torch.where(PADDED[..., None], 7.0, x)
    for training, gradients in WAYS:
        with torch.set_grad_enabled(gradients):
            model.train(training)
            got, again = (model(t, src_key_padding_mask=PADDED) for t in (x, other))
        assert_close(got[~PADDED], again[~PADDED])
        alone = model(x[1:2, :2])
        assert_close(got[1, :2], alone[0])


def test_padded_positions_are_what_torch_gives_without_nested_tensors(targets, norm_first):
    model, x = trained(encoder(norm_first), targets), sequences()
    plain = merged(model)
    plain.use_nested_tensor = False
    with torch.no_grad():
        y = model(x, src_key_padding_mask=PADDED)
        assert_close(y, plain(x, src_key_padding_mask=PADDED), rtol=1e-5, atol=1e-5)
    assert y[PADDED].abs().max() > 0


@prototype
def test_an_encoder_learns_through_every_site(targets, norm_first):
    model, x = trained(encoder(norm_first), targets), sequences()
    plain = merged(model)
    model(x, src_key_padding_mask=PADDED)[~PADDED].square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in lora_core.parameters(model))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    # by the chain rule from what the merged weights get
    plain.requires_grad_()
    plain(x, src_key_padding_mask=PADDED)[~PADDED].square().sum().backward()
    sites = [m for m in model.modules() if isinstance(m, LoRAMixin)]
    assert sites
    for site in sites:
        owner, name = site.lora_kind.home(site)
        path = next(n for n, m in model.named_modules() if m is owner)
        theirs = plain.get_submodule(path).get_parameter(name).grad
        rows = getattr(site, "lora_rows", None)
        theirs = theirs if rows is None else theirs[slice(*rows)]
        A, B = factors_of(site, "default")
        scale = site.lora_state.configs["default"].scale
        assert_close(B.grad, scale * theirs @ A.detach().T, atol=1e-4, rtol=1e-4)
        assert_close(A.grad, scale * B.detach().T @ theirs, atol=1e-4, rtol=1e-4)


@prototype
def test_masks_and_causality_are_torchs_own(targets, norm_first):
    model, x = trained(encoder(norm_first, nested=False), targets), sequences()
    plain = merged(model)
    causal = nn.Transformer.generate_square_subsequent_mask(5)

    def call(model):
        return model(x, mask=causal, is_causal=True)

    expected = in_every_way(plain, call)
    for way, y in in_every_way(model, call).items():
        assert_close(y, expected[way])
        with torch.set_grad_enabled(way[1]):
            assert_close(call(model.train(way[0]))[:, :3], model(x[:, :3], mask=causal[:3, :3]))


@prototype
def test_an_ejected_encoder_takes_its_fast_path_again(targets):
    bare, x = encoder(), sequences()
    model = trained(copy.deepcopy(bare), targets)
    lora_core.eject(model)
    with torch.no_grad():
        expected = bare(x, src_key_padding_mask=PADDED)
        assert torch.equal(model(x, src_key_padding_mask=PADDED), expected)


RECURRENT = {
    "first": ["weight_ih_l0"],
    "hidden": ["weight_hh_l0", "weight_hh_l1"],
    "backwards": ["weight_ih_l0_reverse", "weight_hh_l1_reverse"],
    "all": ["weight_*"],
}


@pytest.fixture(params=[nn.GRU, nn.LSTM, nn.RNN])
def kind(request):
    return request.param


@pytest.fixture(params=RECURRENT.values(), ids=RECURRENT)
def weights(request):
    return request.param


def recurrent(kind, **options):
    torch.manual_seed(0)
    return kind(8, 6, 2, bidirectional=True, batch_first=True, **options).eval()


def packed():
    return pack_padded_sequence(sequences(), LENGTHS, batch_first=True, enforce_sorted=False)


def outputs(found):
    """The output and the last states, of a padded call or a packed one, as one vector."""
    y, last = found
    if isinstance(y, PackedSequence):
        y = pad_packed_sequence(y, batch_first=True)[0]
    states = last if isinstance(last, tuple) else (last,)
    return torch.cat([t.flatten() for t in (y, *states)])


@pytest.mark.parametrize("inputs", [sequences, packed], ids=["padded", "packed"])
def test_a_recurrent_layer_gives_what_the_merged_one_gives_in_every_mode(kind, weights, inputs):
    bare = recurrent(kind)
    model = trained(copy.deepcopy(bare), weights)

    def call(model):
        return outputs(model(inputs()))

    expected, without = in_every_way(merged(model), call), in_every_way(bare, call)
    twin = in_every_way(copy.deepcopy(model), call)
    for way, y in in_every_way(model, call).items():
        assert_close(y, expected[way])
        assert torch.equal(y, twin[way])
        assert (y - without[way]).abs().max() > 0.05
        with lora_core.disabled(model), torch.set_grad_enabled(way[1]):
            assert_close(call(model.train(way[0])), without[way])


def test_a_recurrent_layer_starts_from_states_that_are_given(kind, weights):
    model = trained(recurrent(kind), weights)
    state = torch.randn(4, 3, 6)
    state = (state, state.flip(0)) if kind is nn.LSTM else state
    expected = outputs(merged(model)(sequences(), state))
    assert_close(outputs(model(sequences(), state)), expected)
    assert not torch.allclose(outputs(model(sequences())), expected)


def test_a_recurrent_layer_learns_through_every_site(kind, weights):
    model = trained(recurrent(kind), weights).train()
    outputs(model(packed())).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in lora_core.parameters(model))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_a_copy_of_a_recurrent_layer_is_its_own(kind, weights):
    model, x = trained(recurrent(kind), weights), sequences()
    twin, before = copy.deepcopy(model), outputs(model(x))
    with torch.no_grad():
        for p in lora_core.parameters(twin):
            p.add_(0.5)
    assert torch.equal(outputs(model(x)), before)
    assert not torch.allclose(outputs(twin(x)), before)
    lora_core.eject(twin)
    assert type(twin) is kind
    assert_close(outputs(twin(x)), outputs(recurrent(kind)(x)))
    assert torch.equal(outputs(model(x)), before)


def test_an_ejected_recurrent_layer_runs_on_its_own_weights_again(kind, weights):
    model, bare = trained(recurrent(kind), weights), recurrent(kind)
    lora_core.eject(model)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
    with torch.no_grad():
        for p, q in zip(model.parameters(), bare.parameters(), strict=True):
            p.mul_(2), q.mul_(2)
    assert_close(outputs(model(packed())), outputs(bare(packed())))


# torch has a faster kernel for those that do not
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported:UserWarning")
def test_an_lstm_that_projects_its_output_is_adapted_there_too():
    bare = recurrent(nn.LSTM, proj_size=4)
    model = trained(copy.deepcopy(bare), ["weight_hr_l0", "weight_hh_l1"])
    y = outputs(model(sequences()))
    assert (y - outputs(bare(sequences()))).abs().max() > 0.05
    assert_close(y, outputs(merged(model)(sequences())))


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_a_cell_is_adapted_as_a_layer_is(cell):
    torch.manual_seed(0)
    bare = cell(8, 6)
    model = trained(copy.deepcopy(bare), ["weight_ih", "weight_hh"])

    def call(cell):
        found = cell(sequences()[:, 0])
        return torch.stack(found) if isinstance(found, tuple) else found

    assert (call(model) - call(bare)).abs().max() > 0.05
    assert_close(call(model), call(merged(model)))


def test_a_recurrent_layer_reads_each_weight_to_check_its_type_and_to_run_and_no_more(kind):
    model, reads = trained(recurrent(kind), RECURRENT["all"]), Counter()
    for site in model.modules():
        if isinstance(site, LoRAMixin):
            site.register_forward_hook(lambda site, *_: reads.update([site]))
    model(sequences())
    assert len(reads) == 8
    assert set(reads.values()) == {2}
