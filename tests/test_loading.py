"""Files of other programs on live models: what the peers computed, and what is refused."""

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

import lora_core
from lora_core import ConfigError, MismatchError, UnsupportedFileError
from lora_core._layers import delta_of
from tests.golden import GOLDEN, TinyMix, cases, file_of, grown, models_of


def loaded(name: str, **keywords: Any) -> tuple[dict[str, nn.Module], dict[str, Any], Any]:
    """The models of a golden case with its file on them, what the case says, and the report."""
    case = GOLDEN / name
    about = json.loads((case / "case.json").read_text())
    models = models_of(case, about)
    if about["peer"] == "loralib":
        alphas = about["r_alpha_of_each_layer (not in the file!)"]
        keywords |= {
            "allow_pickle": True,
            "alpha": {n: alpha for n, (_, alpha) in alphas.items()},
            "enable_lora": about["enable_lora"],
        }
    target: Any = models.get("", models)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # notes of the reader, tested with it
        report = lora_core.load(
            target, file_of(case, about), name="golden", strict=False, **keywords
        )
    return models, about, report


@pytest.mark.parametrize("name", cases())
def test_merged_weights_are_those_that_the_peer_computed(name: str) -> None:
    models, about, report = loaded(name)
    before = {f"{c}.{n}": p.detach().clone() for c, m in models.items() for n, p in hosts(m)}
    for model in models.values():
        model.eval()
        if any("lora_" in n for n, _ in model.named_parameters()):
            lora_core.merge(model)
    after = {f"{c}.{n}": p.detach() for c, m in models.items() for n, p in hosts(m)}
    theirs = safetensors.torch.load_file(GOLDEN / name / "delta.safetensors")
    assert theirs
    for key, delta in theirs.items():
        part, path = grown(key, models)
        got = after[f"{part}.{path}"].float() - before[f"{part}.{path}"].float()
        atol = max(about["tolerance"] * delta.abs().max().item(), 2e-7)
        assert_close(got, delta, rtol=0, atol=atol, msg=lambda said, k=key: f"{k}: {said}")
    assert report.format
    assert all(layer.alpha_from for layer in report.layers)


def hosts(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if "lora_" not in n]


@pytest.mark.parametrize("name", [n for n in cases() if n.startswith(("peft/", "lycoris/wrapper"))])
def test_outputs_are_those_that_the_peer_computed(name: str) -> None:
    models, about, _ = loaded(name)
    model = models[""].eval()
    io = safetensors.torch.load_file(GOLDEN / name / "io.safetensors")
    inputs = {k.removeprefix("in."): t for k, t in io.items() if k.startswith("in.")}
    with torch.no_grad():
        outputs = model(**inputs)
        if isinstance(outputs, torch.Tensor):
            outputs = {"": outputs}
    checked = 0
    for key, out in outputs.items():
        wanted = io[f"out.{key}" if f"out.{key}" in io else "out"]
        assert_close(out, wanted, rtol=0, atol=about["tolerance"] * wanted.abs().max().item())
        checked += 1
    assert checked


@pytest.mark.parametrize("name", cases())
def test_a_file_comes_off_again_without_a_trace(name: str) -> None:
    case = GOLDEN / name
    about = json.loads((case / "case.json").read_text())
    bare = {c: m.state_dict() for c, m in models_of(case, about).items()}
    models, _, _ = loaded(name)
    for component, model in models.items():
        if any("lora_" in n for n, _ in model.named_parameters()):
            lora_core.eject(model)
        now = model.state_dict()
        assert list(now) == list(bare[component])
        assert all(torch.equal(now[k], t) for k, t in bare[component].items())


def sd15() -> tuple[dict[str, nn.Module], Path]:
    case = GOLDEN / "kohya" / "sd15_linear"
    about = json.loads((case / "case.json").read_text())
    return models_of(case, about), case / "lora.safetensors"


def test_one_file_is_spread_over_several_models() -> None:
    models, path = sd15()
    report = lora_core.load(models, path)
    assert report.format == "kohya"
    parts = {layer.name.split(".")[0] for layer in report.layers}
    assert parts == {"unet", "text_encoder"}
    assert {layer.alpha for layer in report.layers} == {2.0}
    first = next(layer for layer in report.layers if "attentions" in layer.name)
    assert (first.rank, first.scale, first.form, first.dtype) == (4, 0.5, "LoRA", torch.float32)
    assert "alpha from" in str(report)
    for model in models.values():
        assert any("lora_A" in n for n, _ in model.named_parameters())
        lora_core.eject(model)


def test_a_part_for_a_model_that_is_not_given_is_refused_with_the_hint() -> None:
    models, path = sd15()
    said = (
        f"Every part of {str(path)!r} must have its model, but it also has 12 layers for"
        " 'text_encoder': 'lora_te_text_model_encoder_layers_0_mlp_fc1',"
        " 'lora_te_text_model_encoder_layers_0_mlp_fc2' and 10 more. Load it into {'unet': ...,"
        " 'text_encoder': ...}, or in part with only='unet'."
    )
    for model in (models["unet"], {"unet": models["unet"]}):
        with pytest.raises(MismatchError, match=f"^{re.escape(said)}$"):
            lora_core.load(model, path)
        assert not any("lora_" in n for n, _ in models["unet"].named_parameters())


def test_only_loads_one_part() -> None:
    models, path = sd15()
    report = lora_core.load(models["unet"], path, only="unet")
    assert len(report.layers) == 192
    lora_core.load({"text_encoder": models["text_encoder"]}, path, only="text_encoder")
    with pytest.raises(
        ConfigError, match="^`only` must name a part of .*, but is 'vae'; it has 'text"
    ):
        lora_core.load(models["unet"], path, only="vae", name="other")


def test_a_model_without_a_part_in_the_file_is_refused() -> None:
    models, path = sd15()
    models["text_encoder_2"] = nn.Sequential(nn.Linear(3, 3))
    said = (
        "^Every model must have a part in .*, but 'text_encoder_2' has none; the file has 'text_enc"
    )
    with pytest.raises(MismatchError, match=said):
        lora_core.load(models, path)
    del models["text_encoder_2"]
    lora_core.load(models, path)


def test_a_file_for_another_base_says_what_each_side_has() -> None:
    _, path = sd15()
    model = nn.Sequential(nn.Linear(4, 4))
    said = "^A layer of .* must be in the model, but none of its 204 is: .*; it has 1: '0'\\. Load"
    with pytest.raises(MismatchError, match=said):
        lora_core.load(model, path, strict=False)


def test_a_file_is_put_in_the_place_of_another() -> None:
    models, path = sd15()
    lora_core.load(models, path, name="slot", reserve_rank=6)
    before = {n: p for m in models.values() for n, p in m.named_parameters() if "lora_A" in n}
    report = lora_core.load(models, path, name="slot", replace=True)
    after = {n: p for m in models.values() for n, p in m.named_parameters() if "lora_A" in n}
    assert len(report.layers) == 204
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[n]) and p is not after[n] for n, p in before.items())


def test_what_a_format_does_not_store_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    path = tmp_path / "bare.safetensors"
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    safetensors.torch.save_file({"0.lora_A.weight": A, "0.lora_B.weight": B}, path)
    with pytest.raises(ConfigError, match="^`alpha` must be given for .*, but is missing for '0'"):
        lora_core.load(model, path)
    x = torch.randn(3, 6)
    y = model(x)
    report = lora_core.load(model, path, alpha=3.0)
    assert_close(model(x), y + 1.5 * x @ A.T @ B.T)
    assert report.layers[0].alpha_from


def test_whole_differences_are_exact(tmp_path: Path) -> None:
    """A full difference is full-rank factors, one of them the identity; a bias is one of ours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Flatten(0, 0), nn.Linear(5, 7))
    stored = {
        "lycoris_0.diff": torch.randn(5, 6),
        "lycoris_0.diff_b": torch.randn(5),
        "lycoris_2.diff": torch.randn(7, 5),
    }
    path = tmp_path / "full.safetensors"
    safetensors.torch.save_file(stored, path)
    want = {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lora_core.load(model, path)
    model.eval()
    lora_core.merge(model)
    assert_close(model[0].weight, want["0.weight"] + stored["lycoris_0.diff"], rtol=0, atol=1e-6)
    assert_close(model[0].bias, want["0.bias"] + stored["lycoris_0.diff_b"], rtol=0, atol=1e-6)
    assert_close(model[2].weight, want["2.weight"] + stored["lycoris_2.diff"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["lycoris/refuse_loha", "lycoris/refuse_oft"])
def test_other_algorithms_change_nothing(name: str) -> None:
    model = TinyMix()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(UnsupportedFileError, match="must hold LoRA, but holds"):
        lora_core.load(model, GOLDEN / name / "lycoris.safetensors")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# -- there and back


def trained(seed: int = 0) -> dict[str, nn.Module]:
    """A tiny UNet and text encoder with an adapter whose scale is no power of two."""
    models, _ = sd15()
    torch.manual_seed(seed)
    for part, targets in (("unet", ["to_q", "proj_in", "ff.net.0.proj"]), ("text_encoder", "fc1")):
        lora_core.inject(models[part], 2, 3.0, targets=targets, name="style")
        with torch.no_grad():
            for p in lora_core.parameters(models[part]):
                p.add_(0.3 * torch.randn_like(p))
    return models


def deltas(models: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """What the adapters add to each weight."""
    return {
        f"{part}.{n}": delta_of(m)
        for part, model in models.items()
        for n, m in model.named_modules()
        if hasattr(m, "lora_state")
    }


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("to", ["lora_core", "kohya", "lycoris", "diffusers"])
def test_a_pipeline_is_saved_and_loaded_in_every_format(
    to: str, fold: bool, tmp_path: Path
) -> None:
    models = trained()
    path = tmp_path / "style.safetensors"
    report = lora_core.save(models, path, format=to, fold=fold)
    assert report.nbytes == path.stat().st_size
    others, _ = sd15()
    loaded_report = lora_core.load(others, path)
    assert loaded_report.format == to
    ours, theirs = deltas(models), deltas(others)
    assert ours.keys() == theirs.keys()
    for key, delta in ours.items():
        assert_close(theirs[key], delta, rtol=1e-5 if fold else 0, atol=0)
    again = tmp_path / "again.safetensors"
    lora_core.save(others, again, format=to)
    assert again.stat().st_size


def test_one_model_is_saved_for_peft_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyMix()
    lora_core.inject(
        model, 2, 3.0, targets=["to_q", "conv_in", "head"], rules={"head": {"rank": 4}}
    )
    with torch.no_grad():
        for p in lora_core.parameters(model):
            p.add_(torch.randn_like(p))
    report = lora_core.save(model, tmp_path / "folder", format="peft")
    assert report.nbytes == sum(f.stat().st_size for f in (tmp_path / "folder").iterdir())
    other = TinyMix()
    assert lora_core.load(other, tmp_path / "folder").format == "peft"
    ours, theirs = deltas({"": model}), deltas({"": other})
    assert len(ours) == 4
    for key, delta in ours.items():
        assert torch.equal(theirs[key], delta)


def test_adapters_are_values_between_models() -> None:
    first, second = trained(0), trained(1)
    sum_of = lora_core.combine([lora_core.adapter_of(m) for m in (first, second)], [0.5, -2.0])
    third, _ = sd15()
    report = lora_core.load(third, sum_of, name="both", check_base=False)
    assert report.adapter == "both"
    a, b = deltas(first), deltas(second)
    for key, delta in deltas(third).items():
        assert_close(delta, 0.5 * a[key] - 2.0 * b[key], rtol=0, atol=1e-5)


def test_one_part_of_our_own_file_is_loaded_by_its_name(tmp_path: Path) -> None:
    models = trained()
    lora_core.save({"unet": models["unet"]}, tmp_path / "a.safetensors")
    for target in ("bare", "named"):
        unet = sd15()[0]["unet"]
        lora_core.load({"unet": unet} if target == "named" else unet, tmp_path / "a.safetensors")
        assert deltas({"unet": unet}).keys() == deltas({"unet": models["unet"]}).keys()


def test_a_format_for_pipelines_asks_for_the_part(tmp_path: Path) -> None:
    model = TinyMix()
    lora_core.inject(model, 2, targets="to_q")
    said = (
        r"^A module must be of a known part of a pipeline to be written as 'kohya', but .*\. Save"
    )
    with pytest.raises(ConfigError, match=said):
        lora_core.save(model, tmp_path / "a.safetensors", format="kohya")
    with pytest.raises(
        ConfigError, match="^`format` must be one of 'lora_core', 'kohya', .* 'a1111'"
    ):
        lora_core.save(model, tmp_path / "a.safetensors", format="a1111")
    assert not list(tmp_path.iterdir())


def test_one_part_of_our_own_file_is_asked_for_by_name(tmp_path: Path) -> None:
    models = trained()
    lora_core.save(models, tmp_path / "a.safetensors")
    said = "must have its model, but it also has .* for 'text_encoder': .* in part with only='unet'"
    for target in (sd15()[0]["unet"], {"unet": sd15()[0]["unet"]}):
        with pytest.raises(MismatchError, match=said):
            lora_core.load(target, tmp_path / "a.safetensors")
        lora_core.load(target, tmp_path / "a.safetensors", only="unet")  # its base is compared
    value = lora_core.adapter_of(models)
    unet = sd15()[0]["unet"]
    lora_core.load({"unet": unet}, value, only="unet")
    assert deltas({"unet": unet}).keys() == deltas({"unet": models["unet"]}).keys()
    with torch.no_grad():
        other = sd15()[0]["unet"]
        for p in other.parameters():
            p.add_(1.0)
    with pytest.raises(MismatchError, match="must be the one that .* was trained on"):
        lora_core.load(other, value, only="unet")


@pytest.mark.parametrize("to", ["lora_core", "kohya", "diffusers"])
def test_a_part_with_a_child_of_its_own_name_is_no_riddle(to: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"unet": nn.ModuleDict({"q": nn.Linear(4, 4)})})

    model, other = build(), build()
    lora_core.inject(model, 2, targets="q")
    lora_core.save({"unet": model}, tmp_path / "a", format=to)
    lora_core.load({"unet": other}, tmp_path / "a")
    assert list(deltas({"": other})) == [".unet.q"]
    lora_core.save(model, tmp_path / "b")
    lora_core.load({"unet": build()}, tmp_path / "b")
    lora_core.load(build(), tmp_path / "b")


def test_a_rank_above_the_sizes_of_a_layer_is_saved_and_loaded(tmp_path: Path) -> None:
    models, _, _ = loaded("loralib/bias_none")
    lora_core.save(models[""], tmp_path / "a")
    case = GOLDEN / "loralib" / "bias_none"
    other = models_of(case, json.loads((case / "case.json").read_text()))[""]
    lora_core.load(other, tmp_path / "a")
    ours, theirs = deltas(models), deltas({"": other})
    assert ours
    assert all(torch.equal(theirs[key], delta) for key, delta in ours.items())


def test_adapters_are_equal_where_their_numbers_are(tmp_path: Path) -> None:
    lora_core.save(trained(), tmp_path / "a")
    one, other = lora_core.read(tmp_path / "a"), lora_core.read(tmp_path / "a")
    assert one == other
    assert lora_core.combine([one], [1]) == other
    next(iter(other.layers.values())).parts["lora_A"].add_(1.0)
    assert one != other
    assert repr(one) == f"Adapter('style', lora_core, {len(one.layers)} layers)"


def test_one_module_by_two_names_is_not_summed_as_two(tmp_path: Path) -> None:
    models = trained()
    lora_core.save({"unet": models["unet"]}, tmp_path / "a", format="diffusers")
    bare, named = lora_core.adapter_of(models["unet"]), lora_core.read(tmp_path / "a")
    with pytest.raises(MismatchError, match="^Adapters must call a module by one name to be comb"):
        lora_core.combine([bare, named], [1, 1])


class RootNorm(nn.Module):
    """As the models of transformers have it: one weight, no bias, a class of their own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


NORMS: dict[str, Any] = {
    "layer": lambda: nn.LayerNorm(4),
    "layer without bias": lambda: nn.LayerNorm(4, bias=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "batch": lambda: nn.BatchNorm1d(4),
    "rms": lambda: nn.RMSNorm(4),
    "of transformers": lambda: RootNorm(4),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_differences_of_normalisation_are_added_where_it_reads_them(
    kind: str, training: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), NORMS[kind]()).train(training)
    x, parts = torch.randn(3, 4), {n: torch.randn(4) for n, _ in model[1].named_parameters()}
    asked, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name, p in asked[1].named_parameters():
            p.add_(parts[name])
        asked[0].weight += torch.ones(4, 4)
    stored = {f"lycoris_1.{name[0]}_norm": t for name, t in parts.items()}
    safetensors.torch.save_file(stored | {"lycoris_0.diff": torch.ones(4, 4)}, tmp_path / "a")
    report = lora_core.load(model, tmp_path / "a")
    assert [x.name for x in report.layers] == ["0", *(f"1.{name}" for name in parts)]
    assert_close(model(x), asked(x))
    with lora_core.disabled(model):
        assert_close(model(x), copy.deepcopy(model)(x))
    for name, p in model[1].named_parameters():
        assert "lora" in name or torch.equal(p, before[f"1.{name}"])
    lora_core.save(model, tmp_path / "b")
    again = nn.Sequential(nn.Linear(4, 4), NORMS[kind]()).train(training)
    again.load_state_dict(before)
    lora_core.load(again, tmp_path / "b")
    assert_close(again(x), asked(x))
    lora_core.save(model, tmp_path / "c", format="lycoris", fold=True)
    kept = safetensors.torch.load_file(tmp_path / "c")
    for key, t in stored.items():
        assert torch.equal(kept[key], t)
    lora_core.merge(model.eval())
    merged = {n: p for n, p in model.named_parameters() if "lora" not in n}
    for name, p in asked.named_parameters():
        assert_close(merged[name], p, rtol=0, atol=0)
    lora_core.unmerge(model)
    lora_core.eject(model)
    assert type(model[1]) is type(asked[1])
    learned = {n: t for n, t in before.items() if "running" not in n and "tracked" not in n}
    for name, t in learned.items():
        assert torch.equal(model.state_dict()[name], t)


def test_a_pipeline_given_as_one_module_is_told_to_be_given_by_its_parts(tmp_path: Path) -> None:
    whole = nn.Module()
    whole.unet = nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4)})
    path = tmp_path / "kohya.safetensors"
    stem = "lora_unet_to_q"
    safetensors.torch.save_file(
        {f"{stem}.lora_down.weight": torch.ones(1, 4), f"{stem}.lora_up.weight": torch.ones(4, 1)},
        path,
    )
    said = r"but none of its 1 is: .* Give the models in it by part: {'unet': model.unet}\.$"
    with pytest.raises(MismatchError, match=said):
        lora_core.load(whole, path)
    assert len(lora_core.load({"unet": whole.unet}, path).layers) == 1


class Conv1D(nn.Module):
    """GPT-2's layer, which stores its matrix (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def pefts(folder: Path, tensors: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A folder as PEFT writes it."""
    named = {f"base_model.model.{key}": t.clone() for key, t in tensors.items()}
    safetensors.torch.save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def factors(name: str, ins: int, outs: int) -> dict[str, torch.Tensor]:
    return {
        f"{name}.lora_A.weight": torch.randn(2, ins),
        f"{name}.lora_B.weight": torch.randn(outs, 2),
    }


def test_values_of_a_layer_that_stores_its_matrix_the_other_way(tmp_path: Path) -> None:
    model = nn.ModuleDict({"c": Conv1D(12, 4), "d": Conv1D(6, 4)})
    x, bias = torch.randn(3, 4), torch.randn(12)
    pair, whole = factors("c", 4, 12), {"d.weight": torch.randn(4, 6), "d.bias": torch.randn(6)}
    tensors = pair | whole | {"c.base_layer.bias": bias}
    asked = x @ (model["c"].weight + (pair["c.lora_B.weight"] @ pair["c.lora_A.weight"]).T) + bias
    lora_core.load(model, pefts(tmp_path, tensors, bias="all", fan_in_fan_out=True))
    assert_close(model["c"](x), asked, rtol=1e-5, atol=1e-5)
    assert_close(model["d"](x), x @ whole["d.weight"] + whole["d.bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beside", [True, False])
def test_a_bias_beside_a_weight_that_attention_reads_itself(beside: bool, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    x, bias = torch.randn(2, 3, 8), torch.randn(8)
    pair = factors("a.out_proj", 8, 8) if beside else factors("a.in_proj_weight", 8, 24)
    if not beside:
        pair = {k.replace("a.in_proj_weight", "a"): t for k, t in pair.items()}
    asked = copy.deepcopy(model)
    with torch.no_grad():
        asked["a"].out_proj.bias.copy_(bias)
        target = asked["a"].out_proj.weight if beside else asked["a"].in_proj_weight
        up, down = (next(t for k, t in pair.items() if half in k) for half in ("lora_B", "lora_A"))
        target.add_(up @ down)
    lora_core.load(model, pefts(tmp_path, {**pair, "a.out_proj.bias": bias}, bias="all"))
    assert_close(model["a"](x, x, x)[0], asked["a"](x, x, x)[0], rtol=1e-4, atol=1e-5)
    lora_core.merge(model)
    assert_close(model["a"](x, x, x)[0], asked["a"](x, x, x)[0], rtol=1e-4, atol=1e-5)


def test_differences_of_parameters_of_more_dimensions(tmp_path: Path) -> None:
    model = nn.ModuleDict({"n": nn.LayerNorm((2, 4, 5)), "up": nn.ConvTranspose2d(3, 4, 2)})
    parts = {"n.weight": torch.randn(2, 4, 5), "up.weight": torch.randn(3, 4, 2, 2)}
    parts |= {"n.bias": torch.randn(2, 4, 5), "up.bias": torch.randn(4)}
    asked = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in asked.named_parameters():
            p.add_(parts[name])
    names = {"weight": "diff", "bias": "diff_b"}
    stored = {f"lycoris_{n.split('.')[0]}.{names[n.split('.')[1]]}": t for n, t in parts.items()}
    safetensors.torch.save_file(stored, tmp_path / "a")
    lora_core.load(model, tmp_path / "a")
    x, y = torch.randn(2, 2, 4, 5), torch.randn(2, 3, 4, 4)
    assert_close(model["n"](x), asked["n"](x))
    assert_close(model["up"](y), asked["up"](y))


def test_what_the_base_had_may_stand_beside_factors_and_other_values_may_not(
    tmp_path: Path,
) -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    table, head = (model[name].weight.detach().clone() for name in ("emb", "head"))
    tensors = {"emb.lora_embedding_A": torch.randn(2, 9), "emb.lora_embedding_B": torch.randn(4, 2)}
    tensors |= {"emb.base_layer.weight": table, "head.base_layer.weight": head}
    tensors |= factors("head", 4, 9)
    report = lora_core.load(model, pefts(tmp_path, tensors))
    assert [layer.rank for layer in report.layers] == [2, 2]
    lora_core.eject(model)
    with pytest.raises(MismatchError, match="must have factors or a whole weight, but 'head.wei"):
        lora_core.load(model, pefts(tmp_path, tensors | {"head.base_layer.weight": head + 1}))


def test_a_parameters_name_hides_no_module_and_two_are_not_one(tmp_path: Path) -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "norm_weight": nn.Linear(4, 4)})
    stored = {"lycoris_norm_weight.lora_down.weight": torch.ones(1, 4)}
    stored |= {"lycoris_norm_weight.lora_up.weight": torch.ones(4, 1)}
    safetensors.torch.save_file(stored, tmp_path / "a")
    assert [layer.name for layer in lora_core.load(model, tmp_path / "a").layers] == ["norm_weight"]
    alone = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    for more in (stored, {"lycoris_norm_weight.diff": torch.ones(4)}):
        safetensors.torch.save_file(more | {"lycoris_norm.w_norm": torch.ones(4)}, tmp_path / "b")
        with pytest.raises(MismatchError, match="lycoris_norm_weight"):
            lora_core.load(alone, tmp_path / "b")
        assert torch.equal(alone["norm"].weight, torch.ones(4))


def test_a_vector_that_another_module_reads_too_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"n": nn.LayerNorm(4), "m": nn.LayerNorm(4), "q": nn.Linear(4, 4)})
    model["m"].weight = model["n"].weight
    safetensors.torch.save_file({"lycoris_n.w_norm": torch.ones(4)}, tmp_path / "a")
    said = (
        "^A vector must be one module's to be changed, but that of 'lycoris_n_weight' in '.*' is"
        " 'n.weight', 'm.weight'. Untie it,"
    )
    with pytest.raises(MismatchError, match=said):
        lora_core.load(model, tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"dilation": 2}, "dilation"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding mode of its own"),
    ],
)
def test_a_convolution_that_peft_runs_otherwise_than_it_merges_is_refused(
    options: dict[str, Any], what: str, tmp_path: Path
) -> None:
    model = nn.ModuleDict({"c": nn.Conv2d(3, 4, 3, **options), "d": nn.Conv2d(3, 4, 1, dilation=2)})
    tensors = {
        "c.lora_A.weight": torch.randn(2, 3, 3, 3),
        "c.lora_B.weight": torch.randn(4, 2, 1, 1),
    }
    tensors |= {"d.lora_A.weight": torch.randn(2, 3, 1, 1)}
    tensors |= {"d.lora_B.weight": torch.randn(4, 2, 1, 1)}
    folder = pefts(tmp_path, tensors)
    said = (
        f"^A convolution must have no {what} for a file of PEFT's, but 'c' in '.*' has: PEFT trains"
        " its update without, as no change of the weight would be. Pass strict=False for what PEFT"
        r" merges of it\.$"
    )
    with pytest.raises(MismatchError, match=said):
        lora_core.load(model, folder)
    with pytest.warns(UserWarning, match="as PEFT merges it, and not as it runs: 'c'"):
        assert len(lora_core.load(model, folder, strict=False).layers) == 2
    with pytest.raises(
        ConfigError, match=f"must have no {what} to be saved as 'peft', but 'c' has"
    ):
        lora_core.save(model, tmp_path / "b", format="peft")
    assert not (tmp_path / "b").exists()


def test_room_is_made_for_layers_and_not_for_vectors(tmp_path: Path) -> None:
    model = nn.ModuleDict({"n": nn.LayerNorm(4), "q": nn.Linear(4, 4)})
    stored = {"lycoris_n.w_norm": torch.ones(4), "lycoris_q.lora_down.weight": torch.ones(1, 4)}
    stored |= {"lycoris_q.lora_up.weight": torch.ones(4, 1)}
    safetensors.torch.save_file(stored, tmp_path / "a")
    report = lora_core.load(model, tmp_path / "a", reserve_rank=3)
    assert {x.name: x.config.room for x in report.layers} == {"n.weight": 1, "q": 3}


def test_strict_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^`strict` must be True or False, but is 'no'.$"):
        lora_core.load(nn.Linear(2, 2), tmp_path / "a", strict="no")  # type: ignore[arg-type]


def test_a_bias_in_a_file_of_ours_must_find_one(tmp_path: Path) -> None:
    model, bare = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8, bias=False))
    lora_core.inject(model, rank=2, targets="0", bias=True)
    lora_core.save(model, tmp_path / "a.safetensors")
    said = "1 of 1 differ: '0 (file adds to a bias, model has none there)'. Load it into the model"
    with pytest.raises(MismatchError, match=re.escape(said)):
        lora_core.load(bare, tmp_path / "a.safetensors", check_base=False)
    with pytest.raises(
        ConfigError, match=r"^A setting must fit its layer, but `bias=True` needs a"
    ):
        lora_core.inject(bare, rank=2, targets=["0"], rules={"0": {"bias": True}})
    assert type(bare[0]) is nn.Linear


def test_a_file_that_drops_inputs_drops_none_where_a_weight_is_read(tmp_path: Path) -> None:
    source = nn.ModuleDict({"attn": nn.ModuleDict({"out_proj": nn.Linear(8, 8)})})
    lora_core.inject(source, rank=2, targets="out_proj", dropout=0.1, name="p")
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    lora_core.inject(model, rank=2, targets="out_proj", name="q")
    for p in (*lora_core.parameters(source), *lora_core.parameters(model)):
        p.data.normal_()
    path = tmp_path / "p.safetensors"
    lora_core.save(source, path)
    with pytest.warns(UserWarning, match="no input is dropped where a weight is read: 'attn.ou"):
        report = lora_core.load(model, path, check_base=False)
    assert report.layers[0].config.dropout == 0
    lora_core.scales(model, p=1.0, q=1.0)
    read = [model.train(mode)["attn"].out_proj.weight.detach() for mode in (True, False)]
    assert torch.equal(*read)
    lora_core.scales(model, q=1.0)
    assert not torch.equal(model["attn"].out_proj.weight, read[0])
