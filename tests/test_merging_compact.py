"""A compact merge keeps what the merged weights don't tell, and gives every bit back by it."""

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lora_core
from benchmarks.measure import peak_bytes
from lora_core import ConfigError, LoRALinear, MergeError
from lora_core._merging import residue
from lora_core._merging.exact import exact
from lora_core._merging.residue import Residue, Rooms, residue_of
from lora_core._merging.sums import Sum
from lora_core.testing.laws import train_pretend
from tests.test_kinds import EXTRA, built, first, trained
from tests.test_merging import Conv1D, adapted, interrupted, one_thread, weights

__all__ = ["one_thread"]  # a fixture

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is too small to be kept compactly, and many have several pieces."""
    monkeypatch.setattr(residue, "_LEAST", 1)
    monkeypatch.setattr(residue, "_PIECE", 64)


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(WHOLE[t.itemsize])


def assert_same_bits(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(bits(found), bits(wanted))


def drawn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits that are a finite number: denormals, both zeros, huge and tiny ones."""
    whole = WHOLE[dtype.itemsize]
    least, most = torch.iinfo(whole).min, torch.iinfo(whole).max
    values = torch.randint(least, most, shape, dtype=whole, generator=generator).view(dtype)
    odd = torch.tensor([0.0, -0.0, 1.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max / 4])
    some = odd.to(dtype)[torch.randint(5, shape, generator=generator)]
    values = torch.where(torch.rand(shape, generator=generator) < 0.2, some, values)
    return torch.where(values.isfinite(), values, 0.0)


def assert_model(model: nn.Module, wanted: dict[str, Tensor]) -> None:
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_same_bits(found[name], value)


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 200),
    st.integers(-30, 30),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_an_exact_product_is_the_same_in_every_order(
    dtype: torch.dtype, rank: int, inside: int, outside: int, power: int, full: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    A = torch.randn(rank, inside, dtype=wide, generator=generator) * 2.0**power
    B = torch.randn(outside, rank, dtype=wide, generator=generator)
    if full:  # every sum is about as large as any can be
        A, B = (1 - f.abs() / 64 for f in (A * 2.0**-power, B))
    else:  # ranks of unlike size
        A *= torch.rand(rank, 1, dtype=wide, generator=generator) ** 8
    made = exact(A, B, dtype)
    assert made is not None
    total = torch.zeros(outside, inside, dtype=torch.float64)
    for up, down in made.terms(A.device):
        found = up @ down
        order = torch.randperm(up.shape[1], generator=generator)
        one_by_one = torch.zeros_like(found)
        for k in order:
            one_by_one += up[:, k, None] * down[k]
        assert torch.equal(found, one_by_one)
        assert torch.equal(found[:, :1], up[:, order] @ down[order, :1])
        total += found.double()
    error = (total - B.double() @ A.double()).abs().max()
    bound = rank * float(A.double().abs().max() * B.double().abs().max())
    digits = {torch.float32: 20, torch.float64: 40}.get(dtype, 7)
    assert error <= bound * 2.0**-digits


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(1, 5),
    st.floats(-40, 4),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_any_bits_come_back_or_a_copy_is_asked_for(
    dtype: torch.dtype,
    outside: int,
    inside: int,
    rank: int,
    power: float,
    anything: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    weight = torch.randn(outside, inside, generator=generator).to(dtype)
    if anything:  # of a share of the numbers, so that a copy is not asked for each time
        any_bits = drawn((outside, inside), dtype, generator)
        few = torch.rand(weight.shape, generator=generator) < seed % 100 / 1000
        weight = torch.where(few, any_bits, weight)
    A = torch.randn(rank, inside, dtype=wide, generator=generator)
    B = torch.randn(outside, rank, dtype=wide, generator=generator) * 2.0**power
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residue, "_PIECE", 1 + seed % 4096)
        try:
            new, kept = residue_of(Sum(weight, A, B), weight.shape, Rooms())
        except OverflowError:
            assert not (weight.double() + B.double() @ A.double()).to(dtype).isfinite().all()
            return
        if kept is None:
            return
        total = weight.double() + B.double() @ A.double()
        # the rounding is that of the terms, which may be larger than their sum
        terms = weight.double().abs() + B.double().abs() @ A.double().abs()
        off = (new.double() - total.to(dtype).double()).abs()
        tiny = torch.finfo(dtype).smallest_normal
        assert bool((off <= 4 * torch.finfo(dtype).eps * terms + tiny).all())
        kept = kept._replace(merged=new.clone())
        patch.setattr(residue, "_PIECE", 1 + seed % 777)  # other pieces give the same
        assert_same_bits(kept.values(), weight)
        at = torch.randint(weight.numel(), (20,), generator=generator)
        assert_same_bits(kept.take(at), weight.view(-1)[at])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.01])
def test_odd_numbers_among_many_are_kept_apart(dtype: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(300, 512, generator=generator) * 0.02).to(dtype)
    odd = torch.rand(weight.shape, generator=generator) < share
    weight = torch.where(odd, drawn(tuple(weight.shape), dtype, generator), weight)
    wide = torch.promote_types(dtype, torch.float32)
    A = torch.randn(4, 512, dtype=wide, generator=generator)
    B = torch.randn(300, 4, dtype=wide, generator=generator) * 1e-4
    new, kept = residue_of(Sum(weight, A, B), weight.shape, Rooms())
    assert kept is not None
    assert kept.is_packed == (share == 0.0 and dtype in (torch.float32, torch.bfloat16))
    assert len(kept.places) > 50 or not share
    kept = kept._replace(merged=new.clone())
    assert_same_bits(kept.values(), weight)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("at", [0, 60_000, 153_599])
def test_what_is_not_finite_is_refused_wherever_it_is(value: float, at: int) -> None:
    weight = torch.randn(300, 512)
    weight.view(-1)[at] = value
    with pytest.raises(OverflowError):
        residue_of(Sum(weight, torch.ones(1, 512), torch.ones(300, 1)), weight.shape, Rooms())


def compact(model: nn.Module) -> dict[str, Residue]:
    """What a model that is merged keeps, of the layers without a copy."""
    kept = {
        n: m.lora_state.merged.kept for n, m in model.named_modules() if hasattr(m, "lora_state")
    }
    return {name: each for name, each in kept.items() if isinstance(each, Residue)}


def wide_net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 500), nn.Linear(500, 300), nn.Linear(300, 8)).to(dtype)
    lora_core.inject(model, rank=4, targets=nn.Linear)
    train_pretend(model, "default")
    with torch.no_grad():
        for layer in model:
            layer.lora_B_default.mul_(0.01)
    return model.eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_writes_the_very_weights_of_the_other_forms_and_gives_every_bit_back(dtype) -> None:
    model, twin = wide_net(dtype), wide_net(dtype)
    before, pointers = weights(model), [m.weight.data_ptr() for m in model]
    x = torch.randn(5, 300, dtype=dtype)
    expected = model(x)
    report, whole = lora_core.merge(model, reversible="compact"), lora_core.merge(twin)
    assert list(compact(model)) == ["0", "1"]
    assert report.copied == ("2",)  # too small to be worth it
    assert report.loss == pytest.approx(whole.loss, rel=1e-6, abs=1e-12)
    assert_model(model, weights(twin))
    assert [m.weight.data_ptr() for m in model[:2]] == pointers[:2]
    lora_core.unmerge(model)
    assert_model(model, before)
    assert [m.weight.data_ptr() for m in model] == pointers
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("dtype", "share"),
    [
        (torch.float32, 0.30),
        (torch.float64, 0.20),
        (torch.bfloat16, 0.56),
        (torch.float16, 0.56),
    ],
)
def test_it_keeps_a_fraction_of_a_copy_and_the_receipt_says_how_much(dtype, share) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(1024, 1024, dtype=dtype), rank=4).eval()
    train_pretend(layer, "default")
    with torch.no_grad():
        layer.weight.normal_(0, 0.02)
        layer.lora_A_default.normal_()
        layer.lora_B_default.normal_(0, 5e-4)
    report = lora_core.merge(layer, reversible="compact")
    assert report.copied == ()
    assert 0 < report.kept < share * layer.weight.nbytes
    assert f"originals kept in {report.kept:,} bytes; rounding lost" in str(report)
    with torch.no_grad():
        lora_core.unmerge(layer)
        layer.lora_B_default.mul_(0.1)
    smaller = lora_core.merge(layer, reversible="compact").kept
    # half a byte is enough for a small update, where the type's own digits are not few
    assert smaller < (1.01 if dtype in (torch.float16, torch.float64) else 0.6) * report.kept


class Rows(nn.Module):
    """A raw matrix that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(7, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("kind", "extra"), EXTRA, ids=[f"{k}-{'-'.join(map(str, e)) or 'plain'}" for k, e in EXTRA]
)
def test_every_kind_of_layer_comes_back_and_says_where_a_copy_is_kept(kind, extra) -> None:
    model, options, inputs = built(kind)
    lora_core.inject(model, **options, **extra)
    trained(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(1e-3)
        adapted_to = first(model(*inputs))
    before = weights(model)
    report = lora_core.merge(model, reversible="compact")
    kept = compact(model)
    assert len(kept) + len(report.copied) == len(report.layers)
    if kind in ("linear", "conv1d", "conv2d", "conv3d", "embedding") and "dora" not in extra:
        assert kept
    if "dora" in extra:
        assert len(report.copied) == len(report.layers)
    with torch.no_grad():
        torch.testing.assert_close(first(model(*inputs)), adapted_to)
        with lora_core.disabled(model):
            base = first(model(*inputs))
    assert (base - adapted_to).abs().max() > 0
    lora_core.unmerge(model)
    assert_model(model, before)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("make", [lambda: Conv1D(60, 70), Rows, lambda: nn.Embedding(90, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_and_raw_matrices_are_kept_compactly(make, dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype).eval()
    lora_core.inject(model, rank=2, targets="0.w" if isinstance(model[0], Rows) else "0")
    train_pretend(model, "default")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(1e-3)
    twin, before = copy.deepcopy(model), weights(model)
    lora_core.merge(model, reversible="compact")
    lora_core.merge(twin)
    assert compact(model)
    assert_model(model, weights(twin))
    lora_core.unmerge(model)
    assert_model(model, before)


def test_three_hundred_adapters_in_a_row_change_no_bit() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(130, 140, dtype=torch.bfloat16), rank=2).eval()
    with torch.no_grad():
        layer.weight.view(-1)[:999] = drawn((999,), torch.bfloat16, torch.Generator()) / 4
    before = layer.weight.detach().clone()
    kept = 0
    for turn in range(300):
        with torch.no_grad():
            layer.lora_A_default.normal_()
            layer.lora_B_default.normal_(0, 10.0 ** (-(turn % 9)))
        lora_core.merge(layer, reversible="compact")
        kept += bool(compact(layer))
        lora_core.unmerge(layer)
        assert_same_bits(layer.weight, before)
    assert kept > 100


@pytest.fixture
def settings():
    """What may differ between a merge and an unmerge, put back afterwards."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("back", [True, False], ids=["there and back", "back and there"])
def test_threads_precision_and_modes_may_change_in_between(dtype, back: bool) -> None:
    def plain() -> None:
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")

    def other() -> None:
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)

    model = wide_net(dtype)
    before = weights(model)
    one, two = (plain, other) if back else (other, plain)
    one()
    lora_core.merge(model, reversible="compact")
    two()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        lora_core.unmerge(model)
    assert_model(model, before)


def test_the_factors_may_change_while_it_is_merged() -> None:
    model = wide_net()
    before = weights(model)
    lora_core.merge(model, reversible="compact")
    with torch.no_grad():
        model[0].lora_A_default.normal_()
    lora_core.unmerge(model)
    assert_same_bits(model[0].weight, before["0.weight"])


def test_a_merged_weight_that_was_changed_is_refused_and_nothing_is_done() -> None:
    model = wide_net()
    lora_core.merge(model, reversible="compact")
    with torch.no_grad():
        model[1].weight[7, 3] += 1.0
    changed = weights(model)
    said = (
        "A merged weight must be as `merge` left it to be unmerged, but that of '1' was changed"
        " since. What was kept of the originals is no whole copy; put the merged values back, or"
        " load the base model again."
    )
    with pytest.raises(MergeError, match=f"^{re.escape(said)}$"):
        lora_core.unmerge(model)
    said = "A merged weight must be as `merge` left it, but one of shape (300, 500) was changed"
    with pytest.raises(MergeError, match=f"^{re.escape(said)} since. What was kept"):
        lora_core.disabled(model).__enter__()
    assert_model(model, changed)
    assert list(compact(model)) == ["0", "1"]
    with torch.no_grad():
        model[1].weight[7, 3] -= 1.0
    assert_same_bits(model[0].weight, changed["0.weight"])


def exchange_rows(w: Tensor) -> None:
    w[[0, 1]] = w[[1, 0]].clone()


def exchange_columns(w: Tensor) -> None:
    w[:, [2, 5]] = w[:, [5, 2]].clone()


def exchange_two(w: Tensor) -> None:
    w[0, 3], w[9, 8] = float(w[9, 8]), float(w[0, 3])


def turn_two_signs(w: Tensor) -> None:
    w[4, 3] *= -1
    w[5, 3] *= -1


def roll(w: Tensor) -> None:
    w.copy_(w.roll(7, 0))


CHANGES = [exchange_rows, exchange_columns, exchange_two, turn_two_signs, roll]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(256, 256), (129, 257), (1100, 640)])
def test_numbers_that_changed_places_or_signs_are_noticed_before_anything_is_done(
    change: Callable[[Tensor], None], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(*shape[::-1])).to(dtype)
    for layer in model:
        nn.init.normal_(layer.weight, 0, 0.02)
    lora_core.inject(model, rank=2, targets=nn.Linear)
    for p in lora_core.parameters(model):
        p.data.normal_(0, 0.01)
    model[1].lora_B_default.data.zero_()  # so that an exchange would give another original
    lora_core.merge(model, reversible="compact")
    assert list(compact(model)) == ["0", "1"]
    with torch.no_grad():
        change(model[1].weight)
    with pytest.raises(MergeError, match="^A merged weight must be as `merge` left it to be unm"):
        lora_core.unmerge(model)
    assert list(compact(model)) == ["0", "1"]


def test_an_original_that_would_be_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_net()
    lora_core.merge(model, reversible="compact")
    right = residue._Making.again

    def wrong(self: Any, *args: Any) -> Tensor:
        return right(self, *args).mul_(1.25)

    monkeypatch.setattr(residue._Making, "again", wrong)
    merged = weights(model)
    said = "An original must be made again as it was, but that of '0' is not: numbers are rounded"
    with pytest.raises(MergeError, match=f"^{re.escape(said)} otherwise here"):
        lora_core.unmerge(model)
    assert_model(model, merged)
    monkeypatch.undo()
    lora_core.unmerge(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "half", "double", "moved"])
def test_copies_and_casts_unmerge_on_their_own(how: str) -> None:
    model = wide_net()
    before = weights(model)
    lora_core.merge(model, reversible="compact")
    twin: Any = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "half": lambda m: copy.deepcopy(m).half(),
        "double": lambda m: copy.deepcopy(m).double(),
        "moved": lambda m: copy.deepcopy(m).to("cpu", torch.bfloat16).float(),
    }[how](model)
    lora_core.unmerge(twin)
    for name, value in before.items():
        found = twin.get_parameter(name)
        if name.endswith(".weight"):
            assert_same_bits(found, value.to(found.dtype))
    lora_core.unmerge(model)
    assert_same_bits(model[0].weight, before["0.weight"])


def test_it_saves_the_same_file_and_its_state_dict_says_that_it_is_merged(tmp_path: Path) -> None:
    for dtype in DTYPES:
        model = wide_net(dtype)
        lora_core.save(model, tmp_path / "before")
        lora_core.merge(model, reversible="compact")
        lora_core.save(model, tmp_path / "after")
        assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
        assert "0.lora_merged" in model.state_dict()
        with lora_core.disabled(model):
            assert "0.lora_merged" not in model.state_dict()
            twin = copy.deepcopy(model)
        assert twin[0].lora_state.merged is None
        for path in tmp_path.iterdir():
            path.unlink()


def test_disabled_shows_the_originals_and_the_merged_weights_again() -> None:
    model, x = wide_net(), torch.randn(3, 300)
    before = weights(model)
    lora_core.merge(model, reversible="compact")
    merged, pointers = weights(model), [m.weight.data_ptr() for m in model]
    with lora_core.disabled(model):
        assert_same_bits(model[0].weight, before["0.weight"])
        base = model(x)
    assert (model(x) - base).abs().max() > 0
    assert_model(model, merged)
    assert [m.weight.data_ptr() for m in model] == pointers
    lora_core.unmerge(model)
    assert_same_bits(model[0].weight, before["0.weight"])


def test_what_is_kept_can_be_kept_elsewhere() -> None:
    model = wide_net()
    before = weights(model)
    lora_core.merge(model, reversible="compact", keep="cpu")
    lora_core.unmerge(model)
    assert_same_bits(model[0].weight, before["0.weight"])


def test_a_shared_weight_is_untied_and_no_more_is_kept_than_the_other_has() -> None:
    model = wide_net()
    head = nn.Linear(300, 500)
    head.weight = model[0].weight
    whole, before = nn.ModuleDict({"body": model, "head": head}), weights(model)
    report = lora_core.merge(whole, reversible="compact", untie=True)
    assert "body.0" in report.copied
    assert_same_bits(head.weight, before["0.weight"])
    lora_core.unmerge(whole)
    assert model[0].weight is head.weight


@pytest.mark.usefixtures("tiny")
def test_an_overflow_in_the_last_layer_changes_no_layer() -> None:
    for last in (torch.float16, torch.float32):
        model = adapted(torch.float16)
        model[2].to(last)
        with torch.no_grad():
            for layer in model[:2]:
                layer.lora_B_default.mul_(1e-3)
            model[2].weight.fill_(torch.finfo(last).max)
            model[2].lora_B_default.fill_(1.0)
            model[2].lora_A_default.fill_(1e4 if last == torch.float16 else 1e36)
        before = weights(model)
        said = "^A merged weight must be finite, but that of '2' overflows"
        with pytest.raises(MergeError, match=said):
            lora_core.merge(model, reversible="compact")
        assert_model(model, before)
        assert [layer.lora_state.merged for layer in model] == [None] * 3


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("verb", ["merge", "unmerge"])
def test_an_interrupt_at_any_line_undoes_a_merge_and_leaves_no_layer_half_unmerged(verb) -> None:
    def made() -> nn.Sequential:
        model = adapted(layers=3)
        with torch.no_grad():
            for layer in model[:2]:
                layer.lora_B_default.mul_(1e-3)
            model[2].weight.zero_()  # nothing of it can be made again: it is copied
        return model

    at, hit, seen = 0, True, set()
    while hit:
        at += 1
        model = made()
        plain = weights(model)
        lora_core.merge(model, reversible="compact")
        assert list(compact(model)) == ["0", "1"]
        merged = weights(model)
        if verb == "merge":
            lora_core.unmerge(model)

        def act(model: nn.Module = model) -> None:
            if verb == "merge":
                lora_core.merge(model, reversible="compact")
            else:
                lora_core.unmerge(model)

        hit = interrupted(act, at)
        states = [layer.lora_state.merged is not None for layer in model]
        seen.add(tuple(states))
        if verb == "merge":
            assert len(set(states)) == 1, f"half merged at line {at}"
        for i, is_merged in enumerate(states):
            wanted = merged if is_merged else plain
            assert_same_bits(model[i].weight, wanted[f"{i}.weight"])
        if any(states):
            lora_core.unmerge(model)
        assert_model(model, plain)
    assert len(seen) >= (2 if verb == "merge" else 3)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_takes_the_memory_of_a_few_layers_however_many_there_are(dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(512, 512, dtype=dtype) for _ in range(12)]).eval()
    lora_core.inject(model, rank=1, targets=nn.Linear)
    train_pretend(model, "default")
    with torch.no_grad():
        for layer in model:
            layer.lora_B_default.mul_(1e-3)
    one = model[0].weight.nbytes
    kept: list[int] = []
    peak = peak_bytes(lambda: kept.append(lora_core.merge(model, reversible="compact").kept))
    assert peak < kept[0] + 5 * one
    peak = peak_bytes(lambda: lora_core.unmerge(model))
    assert peak < 5 * one


@pytest.mark.parametrize("odd", ["half", None, 2])
def test_another_word_is_refused(odd: Any) -> None:
    said = f"`reversible` must be True, False or 'compact', but is {odd!r}."
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        lora_core.merge(adapted(), reversible=odd)


def test_the_memory_of_a_piece_is_taken_again() -> None:
    rooms, like = Rooms(), torch.empty(1)
    first_room = rooms.room("a", like, torch.float32, 4, 8)
    again = rooms.room("a", like, torch.float32, 2, 3)
    assert again.data_ptr() == first_room.data_ptr()
    assert rooms.room("b", like, torch.float32, 2, 3).data_ptr() != first_room.data_ptr()
