"""A file in the place of an adapter: one moment it is the old one, the next the new one."""

import contextlib
import re
import sys
import threading
import time

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import lora_core
from lora_core import (
    AdapterError,
    ConfigError,
    MergeError,
    UnsupportedLayerError,
    eject,
    inject,
    load,
    merge,
    parameters,
    pinned,
    save,
    scales,
    trainable,
    unmerge,
)
from lora_core.testing.laws import train_pretend

SHAPES = {
    "linear": (lambda: nn.Linear(8, 8), lambda: torch.randn(3, 8)),
    "conv": (lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: torch.randn(2, 4, 5, 5)),
}
KEYWORDS = {
    "plain": {},
    "dora": {"dora": True},
    "bias": {"bias": True},
    "pissa": {"init": "pissa"},
    "rslora": {"rslora": True, "alpha": 3.0},
}


def chain(kind="linear", seed=0):
    torch.manual_seed(seed)
    make, x = SHAPES[kind]
    return nn.Sequential(make(), nn.Tanh(), make()), x()


def written(model, path, rank=2, targets=("0", "2"), seed=1, **keywords):
    """Trains an adapter on a bare model, writes it, takes it off, and says what the model gave."""
    torch.manual_seed(seed)
    inject(model, rank, targets=list(targets), name="file", **keywords)
    train_pretend(model, "file")
    save(model, path)
    x = SHAPES["conv" if isinstance(model[0], nn.Conv2d) else "linear"][1]
    torch.manual_seed(9)
    probe = x()
    y = model(probe).detach()
    eject(model)
    return probe, y


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
def test_what_was_loaded_in_place_is_what_a_bare_model_would_have_loaded(kind, keywords, tmp_path):
    model, _ = chain(kind)
    x, y = written(model, tmp_path / "b.safetensors", **keywords)
    bare = model(x).detach()
    inject(model, 3, targets=["0", "2"], name="slot")
    train_pretend(model, "slot")
    report = load(model, tmp_path / "b.safetensors", "slot", replace=True)
    assert torch.equal(model(x), y)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.trainable == sum(p.numel() for p in parameters(model))
    again = tmp_path / "again.safetensors"
    save(model, again)
    reloaded, _ = chain(kind)
    load(reloaded, again)
    assert torch.equal(reloaded(x), y)
    eject(model)
    assert torch.equal(model(x), bare)
    assert all(p.requires_grad for p in model.parameters())


def test_layers_that_one_of_the_two_lacks_come_and_go(tmp_path):
    model, _ = chain()
    x, y = written(model, tmp_path / "b.safetensors", targets=["2"])
    inject(model, 2, targets="0", name="slot")
    train_pretend(model, "slot")
    load(model, tmp_path / "b.safetensors", "slot", replace=True)
    assert torch.equal(model(x), y)
    assert [type(m).__name__ for m in model] == ["Linear", "Tanh", "LoRALinear"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "2.lora_A_slot",
        "2.lora_B_slot",
    ]
    eject(model)
    assert all(p.requires_grad for p in model.parameters())


def test_strength_activity_and_what_trains_stay(tmp_path):
    model, _ = chain()
    written(model, tmp_path / "b.safetensors")
    for name in ("slot", "other"):
        inject(model, 2, targets=["0", "2"], name=name, freeze=name == "slot")
    train_pretend(model, "slot")
    trainable(model, "other")
    scales(model, slot=0.25, other=2.0)
    others = [p for n, p in model.named_parameters() if n.endswith("other")]
    load(model, tmp_path / "b.safetensors", "slot", replace=True)
    assert model[0].lora_state.strengths == {"slot": 0.25, "other": 2.0}
    after = [p for n, p in model.named_parameters() if n.endswith("other")]
    assert all(p is q for p, q in zip(others, after, strict=True))
    assert {n.rpartition("_")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "other"
    }
    scales(model, other=1.0)
    load(model, tmp_path / "b.safetensors", "slot", replace=True)
    assert model[0].lora_state.strengths == {"other": 1.0}  # inactive it stays
    load(model, tmp_path / "b.safetensors", "slot", scale=0.5, replace=True)
    assert model[0].lora_state.strengths == {"other": 1.0, "slot": 0.5}


def test_a_block_of_scales_around_it_ends_as_it_began(tmp_path):
    model, _ = chain()
    x, y = written(model, tmp_path / "b.safetensors", alpha=7.0)
    inject(model, 2, targets=["0", "2"], name="slot")
    with scales(model, slot=0.5):
        load(model, tmp_path / "b.safetensors", "slot", replace=True)
        assert model[0].lora_state.strengths == {"slot": 0.5}
    assert model[0].lora_state.strengths == {"slot": 1.0}
    assert torch.equal(model(x), y)  # with the new scale, 3.5, and not the old one


def test_a_reserve_pads_a_file_and_saves_it_unpadded(tmp_path):
    model, _ = chain()
    x, y = written(model, tmp_path / "b.safetensors", rank=2)
    load(model, tmp_path / "b.safetensors", "slot", reserve_rank=5)
    assert [tuple(p.shape) for p in parameters(model)] == [(5, 8), (8, 5)] * 2
    torch.testing.assert_close(model(x), y)
    save(model, tmp_path / "again.safetensors", metadata={})
    load(chain()[0], tmp_path / "again.safetensors")
    same = (tmp_path / "again.safetensors").read_bytes().replace(b"slot", b"file")
    assert same == (tmp_path / "b.safetensors").read_bytes()


def test_a_reserve_that_is_too_small_says_how_much_is_needed(tmp_path):
    model, _ = chain()
    written(model, tmp_path / "b.safetensors", rank=4)
    inject(model, 1, targets=["0", "2"], name="slot", reserve_rank=3)
    before = dict(model.named_parameters())
    message = (
        "`reserve_rank` must be at least the rank 4 of the file, but is 3 at '0'. Pass"
        " reserve_rank=4 or more; a compiled model is compiled once more then."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        load(model, tmp_path / "b.safetensors", "slot", replace=True)
    with pytest.raises(ConfigError, match=r"^`reserve_rank` must be at most min.* = 8, but is 9"):
        load(model, tmp_path / "b.safetensors", "slot", replace=True, reserve_rank=9)
    assert all(p is before[n] for n, p in model.named_parameters())
    load(model, tmp_path / "b.safetensors", "slot", replace=True, reserve_rank=4)


def test_a_name_that_is_not_there_is_refused(tmp_path):
    model, _ = chain()
    written(model, tmp_path / "b.safetensors")
    inject(model, 2, targets="0", name="slot")
    message = (
        "`name` must be an adapter of the model to be replaced, but is 'sloth'; it has 'slot'."
        " Load without replace=True to add one."
    )
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        load(model, tmp_path / "b.safetensors", "sloth", replace=True)


def test_a_merged_model_is_refused(tmp_path):
    model, _ = chain()
    x, y = written(model, tmp_path / "b.safetensors", targets=["2"])
    inject(model, 2, targets="0", name="slot")
    train_pretend(model, "slot")
    merge(model)
    with pytest.raises(MergeError, match="must be unmerged to take an adapter, but '0' is"):
        load(model, tmp_path / "b.safetensors", "slot", replace=True)
    unmerge(model)
    load(model, tmp_path / "b.safetensors", "slot", replace=True)
    assert torch.equal(model(x), y)


def test_an_error_midway_leaves_the_old_adapter(tmp_path, monkeypatch):
    model, _ = chain()
    written(model, tmp_path / "b.safetensors")
    inject(model, 3, targets=["0", "2"], name="slot")
    train_pretend(model, "slot")
    x = torch.randn(3, 8)
    y = model(x)
    before = dict(model.named_parameters())
    made = []

    def exchange(layer, *args):
        if made:
            raise KeyboardInterrupt
        made.append(layer)
        lora_core._layers.exchange(layer, *args)

    monkeypatch.setattr("lora_core._injection.surgery.exchange", exchange)
    with pytest.raises(KeyboardInterrupt):
        load(model, tmp_path / "b.safetensors", "slot", replace=True)
    assert made
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[n] for n, p in model.named_parameters())
    assert torch.equal(model(x), y)


def test_another_thread_sees_one_adapter_or_the_other(tmp_path):
    """Factors, scale and magnitude of one file each time, never of both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(files):
        inject(model, 2 + seed, alpha=1.0 + seed, targets="0", name="file", dora=bool(seed))
        torch.manual_seed(seed)
        train_pretend(model, "file")
        save(model, path)
        eject(model)
    x, expected = torch.randn(4, 64), []
    load(model, files[0], "slot")
    for path in files:
        load(model, path, "slot", replace=True)
        expected.append(model(x).detach())
    wrong, seen, stop = [], [0, 0], threading.Event()

    def watch():
        with torch.no_grad():
            while not stop.is_set():
                y = model(x)
                hits = [torch.allclose(y, e, atol=1e-5) for e in expected]
                if sum(hits) != 1:
                    wrong.append(y)
                seen[hits.index(True)] += 1

    threads = [threading.Thread(target=watch) for _ in range(2)]
    for t in threads:
        t.start()
    for i in range(200):
        load(model, files[i % 2], "slot", replace=True)
        time.sleep(0.001)  # the others' turn
    stop.set()
    for t in threads:
        t.join()
    assert not wrong
    assert min(seen) > 10


def test_a_pinned_adapter_that_was_replaced_is_an_error(tmp_path):
    model, x = chain()
    written(model, tmp_path / "b.safetensors", alpha=7.0)
    inject(model, 2, targets=["0", "2"], name="slot")
    swap = threading.Thread(
        target=load, args=(model, tmp_path / "b.safetensors", "slot"), kwargs={"replace": True}
    )
    with (
        pinned(model),
        pytest.raises(AdapterError, match=r"must stay while it is pinned, but 'slot' was taken"),
    ):
        swap.start()
        swap.join()
        model(x)
    assert model(x).isfinite().all()
    with pinned(model), pytest.raises(ConfigError, match=r"^`load` must be called outside `with"):
        load(model, tmp_path / "b.safetensors", "slot", replace=True)


def test_an_adapter_of_another_thread_is_not_seen_where_nothing_was_when_it_was_pinned(tmp_path):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 8))
            self.q = nn.Linear(8, 8)

        def forward(self, x):
            return self.q(x) @ self.table

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), Reads()), torch.randn(3, 8)
    inject(model, 2, targets="0")
    y = model(x)

    def more():
        inject(model, 2, targets=["table", "q"], name="more")
        train_pretend(model, "more")

    with pinned(model):
        thread = threading.Thread(target=more)
        thread.start()
        thread.join()
        assert torch.equal(model(x), y)
    assert not torch.equal(model(x), y)


def swapped(kind, tmp_path, **keywords):
    """A compiled model in whose slot two files of ranks 2 and 3 come and go, and what each gave."""
    torch._dynamo.reset()
    model, x = chain(kind)
    files, expected = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], []
    for seed, path in enumerate(files):
        written(model, path, rank=2 + seed, seed=seed, alpha=1.0 + seed, **keywords)
        bare, _ = chain(kind)
        load(bare, path)
        expected.append(bare(x).detach())
    load(model, files[0], "slot", reserve_rank=4)
    load(model, files[1], "other", reserve_rank=4)
    scales(model, slot=1.0)
    counter = torch._dynamo.testing.CompileCounter()
    return model, torch.compile(model, backend=counter, fullgraph=True), x, files, expected, counter


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"bias": True}, {"dora": True}], ids=str)
@pytest.mark.parametrize("kind", SHAPES)
def test_nothing_of_this_compiles_a_compiled_model_again(kind, keywords, training, tmp_path):
    model, compiled, x, files, expected, counter = swapped(kind, tmp_path, **keywords)
    model.train(training)

    def out():
        if training:
            y = compiled(x)
            y.sum().backward()
            return y.detach()
        with torch.no_grad():
            return compiled(x)

    torch.testing.assert_close(out(), expected[0])
    assert counter.frame_count == 1
    for strength in (0.5, -1.0, 0.0, 1.0):
        scales(model, slot=strength)
        out()
    scales(model, other=1.0)  # another of those loaded
    torch.testing.assert_close(out(), expected[1])
    scales(model, slot=0.5, other=0.5)  # two at once
    out()
    scales(model, slot=1.0)
    for i in (1, 0, 1):  # other files, of other ranks and alphas, in the same slot
        load(model, files[i], "slot", replace=True)
        torch.testing.assert_close(out(), expected[i])
    assert counter.frame_count == 1


# -- what stands around it


class Reads(nn.Module):
    """A layer that is called, and a parameter that is read."""

    def __init__(self):
        super().__init__()
        self.l, self.w = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.l(x) @ self.w


def reading(tmp_path, **keywords):
    """A model of both with an adapter on the layer alone, and a file for both."""
    torch.manual_seed(0)
    model = Reads()
    inject(model, 2, targets=["l", "w"], name="file", rules=keywords.pop("rules", None), **keywords)
    train_pretend(model, "file")
    save(model, tmp_path / "both.safetensors")
    eject(model)
    inject(model, 2, targets="l", name="slot")
    train_pretend(model, "slot")
    return model, tmp_path / "both.safetensors"


@pytest.mark.parametrize("around", ["now", "after the block"])
def test_a_strength_per_sample_does_not_come_to_a_weight_that_all_share(around, tmp_path):
    model, path = reading(tmp_path)
    x = torch.randn(4, 8)
    per_sample = scales(model, slot=torch.linspace(0, 1, 4))
    y = model(x)
    said = "^A strength per sample must go to layers that see samples, but 'slot' has one, and the"
    if around == "now":
        with pytest.raises(UnsupportedLayerError, match=said):
            load(model, path, "slot", replace=True)
        assert torch.equal(model(x), y)
        load(model, path, "slot", scale=0.5, replace=True)  # one number for all
    else:
        with (
            scales(model, slot=1.0),
            pytest.raises(UnsupportedLayerError, match=said),
        ):
            load(model, path, "slot", replace=True)
        assert torch.equal(model(x), y)
    assert per_sample.strengths


@pytest.mark.parametrize("block", ["disabled", "scales", "both"])
def test_layers_that_come_in_a_block_have_the_outer_strength_after_it(block, tmp_path):
    model, path = reading(tmp_path)
    inject(model, 1, targets="l", name="other")
    scales(model, slot=0.25)
    with contextlib.ExitStack() as blocks:
        if block != "scales":
            blocks.enter_context(lora_core.disabled(model))
        if block != "disabled":
            blocks.enter_context(scales(model, other=1.0))
        load(model, path, "slot", replace=True)
    assert model.l.lora_state.strengths == {"slot": 0.25}
    assert model.lora_at_w.lora_state.strengths == {"slot": 0.25}


def trains(model, name):
    return {
        n.rpartition(".")[2]
        for n, p in model.named_parameters()
        if n.endswith(f"_{name}") and p.requires_grad
    }


def test_a_trainable_block_around_it_ends_as_it_began(tmp_path):
    model, path = reading(tmp_path, rules={"l": {"dora": True, "bias": True}})
    inject(model, 1, targets="l", name="other", freeze=False)
    trainable(model, "other")
    with trainable(model, "slot"):  # frozen before
        load(model, path, "slot", replace=True)
        assert len(trains(model, "slot")) == 4
    assert not trains(model, "slot")
    trainable(model, "slot")
    with trainable(model, "other"):  # it trained before
        load(model, path, "slot", replace=True)
        assert not trains(model, "slot")
    assert len(trains(model, "slot")) == 4
    assert sum(p.requires_grad for n, p in model.named_parameters() if "_slot" in n) == 6


def test_what_a_later_adapter_froze_it_gives_back_of_the_new_one(tmp_path):
    model, path = reading(tmp_path, rules={"l": {"dora": True, "bias": True}})
    inject(model, 1, targets="l", name="later")  # freezes what is there
    assert not trains(model, "slot")
    load(model, path, "slot", replace=True)
    assert not trains(model, "slot")
    eject(model, "later")
    assert sum(p.requires_grad for n, p in model.named_parameters() if "_slot" in n) == 6
    eject(model)
    assert all(p.requires_grad for p in model.parameters())


def test_layers_come_and_go_beside_calls_in_other_threads(tmp_path):
    torch.manual_seed(0)

    def build():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "a": nn.Linear(8, 8),
                "e": nn.Conv1d(8, 8, 1),
                "r": nn.GRU(8, 8, batch_first=True),
                "m": nn.MultiheadAttention(8, 2, batch_first=True),
            }
        )

    def call(model, x):
        x = model["e"](model["a"](x).mT).mT
        x = model["r"](x)[0]
        return model["m"](x, x, x, need_weights=False)[0]

    model, x = build(), torch.randn(2, 3, 8)
    files = [tmp_path / "one.safetensors", tmp_path / "all.safetensors"]
    for path, targets in zip(
        files, (["a"], ["a", "e", "r.weight_hh_l0", "m.q_proj_weight", "m.out_proj"]), strict=True
    ):
        inject(model, 2, targets=targets, name="slot")
        train_pretend(model, "slot")
        save(model, path)
        eject(model)
    load(model, files[0])
    errors, calls, stop = [], [0], threading.Event()

    def watch():
        with torch.no_grad():
            while not stop.is_set():
                try:
                    assert call(model, x).isfinite().all()
                    calls[0] += 1
                except BaseException as error:
                    errors.append(repr(error))

    threads = [threading.Thread(target=watch) for _ in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    for t in threads:
        t.start()
    try:
        for i in range(60):
            load(model, files[i % 2], "slot", replace=True)
            if i % 10 == 9:
                eject(model)
                load(model, files[i % 2])
    finally:
        stop.set()
        for t in threads:
            t.join()
        sys.setswitchinterval(before)
    assert not errors, errors[:3]
    assert calls[0] > 20


def test_an_adapter_that_left_leaves_no_norms_behind():
    from lora_core._layers import lengths

    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("x", "y"):
        inject(model, 2, targets="0", name=name, dora=True)
        model(torch.randn(2, 8))
        assert name in lengths._KNOWN[model[0]]
    eject(model, "x")
    assert "x" not in lengths._KNOWN[model[0]]
    eject(model)
    assert model[0] not in lengths._KNOWN


def test_reserved_ranks_stay_empty_on_the_way_through_the_meta_device(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 4, 3))
    inject(model, 2, targets="*", rules={"1": {"tucker": False}}, reserve_rank=4)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            if not p.requires_grad:
                p.normal_()
    optimizer = torch.optim.SGD(parameters(model), 0.1, weight_decay=0.1)
    x = torch.randn(3, 1, 8, 8)
    for _ in range(3):
        model[1](model[0](x)).square().mean().backward()
        optimizer.step()
    y = model(x)
    save(model, tmp_path / "a.safetensors")
    eject(model)
    load(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("keywords", [{"dora": True}, {"init": "pissa"}], ids=str)
def test_what_was_made_from_values_can_not_be_emptied(keywords):
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, 2, targets="0", **keywords)
    model.to("meta")
    with pytest.raises(UnsupportedLayerError, match="^An adapter must keep what it was made from"):
        model.to_empty(device="cpu")


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", "kaiming"])
def test_an_emptied_adapter_is_drawn_as_it_was_asked_to_be(init):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    inject(model, 8, targets="0", init=init)
    model.to_empty(device="cpu")
    A, B = (p.detach() for p in parameters(model))
    assert not B.any()
    if init == "orthogonal":
        torch.testing.assert_close(A @ A.T, torch.eye(8), atol=1e-5, rtol=0)
    elif init == "gaussian":
        assert 0.1 < A.std() < 0.15
    else:
        assert A.abs().max() <= 1 / 8


def test_numbers_in_reserved_ranks_are_not_dropped_in_silence(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, 2, targets="0", reserve_rank=4)
    with torch.no_grad():
        model[0].lora_B_default.fill_(1.0)
    save(model, tmp_path / "a.safetensors")  # with zeros in lora_A they add nothing
    with torch.no_grad():
        model[0].lora_A_default.fill_(1.0)
    said = "^Ranks that are only reserved must stay zero to be saved, but those of 'lora_A', 'lora_"
    with pytest.raises(ConfigError, match=said):
        save(model, tmp_path / "a.safetensors")


def test_a_reserve_must_fit_the_layer_as_a_rank_must(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 8, 3))
    inject(model, 2, targets="0", tucker=True, name="file")
    save(model, tmp_path / "a.safetensors")
    eject(model)
    with pytest.raises(ConfigError, match="needs a rank of at most the 2 channels .* not 4 at '0'"):
        load(model, tmp_path / "a.safetensors", reserve_rank=4)
    load(model, tmp_path / "a.safetensors")


def test_samples_that_want_only_the_base_get_it():
    model, x = chain()
    y = model(x)
    inject(model, 2, targets=["0", "2"])
    train_pretend(model, "default")
    with scales(model, [None, None, None]):
        assert torch.equal(model(x), y)
    assert not torch.equal(model(x), y)
