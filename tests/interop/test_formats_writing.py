"""What we write is read by the programs it is written for, and their outputs are ours.

The expected outputs are those of a copy of the model with every update added to its weights.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from lora_core._config import AdapterConfig
from lora_core._formats import Adapter, AdapterLayer, encode, read, write
from lora_core._formats.deltas import bias_delta, dense_delta

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
lycoris = pytest.importorskip("lycoris")
loralib = pytest.importorskip("loralib")
modules = pytest.importorskip("lycoris.modules")

pytestmark = [
    pytest.mark.interop,
    # the peers' own, of one another and of torch
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SAME_FOLDER = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
)
RANKS = (1, 2, 3)
ALPHAS = (1.0, 2.0, 5.0, 0.3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.to_q, self.proj_out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(torch.tanh(self.fc(x)) * self.to_q(x))


class Net(nn.Module):
    """Linear layers, convolutions and an embedding; names that are ends or starts of others."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.layers = nn.ModuleList([Block() for _ in range(12)])  # 1 and 11
        self.fc = nn.Linear(8, 8)  # and layers.0.fc
        self.norm = nn.LayerNorm(8)
        self.conv, self.conv_1x1 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.along = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for block in self.layers:
            x = block(x)
        x = self.norm(self.fc(x))
        x = x + self.along(x.mT).mT
        image = x.reshape(len(x), 2, 4, -1)
        return self.conv_1x1(torch.tanh(self.conv(image)))


LINEAR = ("fc", "layers.0.fc", "layers.1.to_q", "layers.11.to_q", "layers.11.proj_out")
CONV = ("conv", "conv_1x1", "along")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(16).reshape(2, 8) % 9


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The peers log what is no error; what they log as one is to be seen."""
    names = ("diffusers", "LyCORIS")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def layer(
    module: nn.Module,
    rank: int = 2,
    alpha: float = 3.0,
    *extras: str,
    rslora: bool = False,
    component: str = "",
    path: str = "",
) -> AdapterLayer:
    """An adapter of a module, trained by chance."""
    weight = module.weight
    kind = {nn.Linear: "linear", nn.Embedding: "embedding"}.get(type(module), "conv")
    out, size, *kernel = weight.shape if kind != "embedding" else weight.shape[::-1]
    ones = [1] * len(kernel)
    inner = ones if "tucker" in extras else kernel
    parts = {
        "lora_A": torch.randn(rank, size, *inner) * 0.3,
        "lora_B": torch.randn(out, rank, *ones) * 0.3,
    }
    if "tucker" in extras:
        parts["lora_mid"] = torch.randn(rank, rank, *kernel)
    if "dora" in extras:
        parts["lora_magnitude"] = torch.rand(out) + 0.5
    if "bias" in extras:
        parts["lora_bias"] = torch.randn(out)
    given_ = {name: name in extras for name in ("tucker", "dora", "bias")}
    config = AdapterConfig(rank, alpha, 0.0, torch.float32, rslora, **given_)
    return AdapterLayer(kind, config, parts, component=component, path=path)


def layers_of(
    model: nn.Module, names: tuple[str, ...] | list[str], *extras: str, **more: Any
) -> dict[str, AdapterLayer]:
    """Layers for these modules, their ranks and alphas all different."""
    component = more.get("component", "")
    found = {}
    for n, name in enumerate(names):
        module = model.get_submodule(name)
        own = [extra for extra in extras if extra != "bias" or module.bias is not None]
        x = layer(
            module,
            *(RANKS[n % 3], ALPHAS[n % 4], *own),
            path=name if component else "",
            **more,
        )
        found[f"{component}.{name}" if component else name] = x
    return found


def merged(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> Any:
    """A copy of the model, the updates a part of its weights."""
    model = copy.deepcopy(model)
    for name, x in layers.items():
        module = model.get_submodule(x.path or name)
        weight, bias = module.weight, module.bias if hasattr(module, "bias") else None
        with torch.no_grad():
            added = bias_delta(x, bias)
            weight += dense_delta(name, x, weight.detach())
            if added is not None:
                bias += added
    return model


# PEFT


def with_peft(model: nn.Module, folder: Path) -> nn.Module:
    found = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    keys = {key for key, _ in found.named_parameters() if "lora_" in key}
    written = encode(read(folder), "peft").tensors
    factors = [key for key in written if ".lora_" in key]
    assert len(keys) == len(factors)  # no module more than ours
    return found.eval()


CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]] = {
    "linear": (LINEAR, (), {}),
    "rslora": (LINEAR, (), {"rslora": True}),
    "conv": (LINEAR + CONV, (), {}),
    "dora": (LINEAR + CONV[:2], ("dora",), {}),
    "dora and rslora": (LINEAR, ("dora",), {"rslora": True}),
    "bias": (LINEAR + CONV, ("bias",), {}),
    "embedding": (("emb", *LINEAR), (), {}),
    "embedding with dora": (("emb", *LINEAR), ("dora",), {}),
}


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_peft_gives_our_outputs(
    case: str, fold: bool, net: Net, ids: Tensor, tmp_path: Path
) -> None:
    names, extras, more = CASES[case]
    layers = layers_of(net, names, *extras, **more)
    write(Adapter("style", layers), tmp_path / "x", "peft", fold=fold)
    expected = merged(net, layers)(ids)
    assert not torch.allclose(expected, net(ids), atol=1e-2)
    assert_close(with_peft(net, tmp_path / "x")(ids), expected, rtol=1e-4, atol=1e-5)


def test_peft_reads_layers_with_a_bias_beside_layers_without(
    net: Net, ids: Tensor, tmp_path: Path
) -> None:
    layers = layers_of(net, LINEAR[:2]) | layers_of(net, LINEAR[2:], "bias")
    layers["fc"] = layer(net.fc, 2, 0.0, "bias")  # which adds its bias alone
    write(Adapter("style", layers), tmp_path / "x", "peft")
    assert_close(with_peft(net, tmp_path / "x")(ids), merged(net, layers)(ids))


def test_peft_reads_rslora_of_some_layers(net: Net, ids: Tensor, tmp_path: Path) -> None:
    layers = layers_of(net, LINEAR[:2]) | layers_of(net, LINEAR[2:], rslora=True)
    write(Adapter("style", layers), tmp_path / "x", "peft")
    assert_close(with_peft(net, tmp_path / "x")(ids), merged(net, layers)(ids))


def test_peft_reads_values(net: Net, ids: Tensor, tmp_path: Path) -> None:
    values = {"weight": torch.randn(8), "bias": torch.randn(8)}
    layers = layers_of(net, LINEAR) | {
        "norm": AdapterLayer("values", None, values),
        "layers.0.fc.bias": AdapterLayer(
            "values", None, {"bias": torch.randn(8)}, path="layers.0.fc"
        ),
    }
    write(Adapter("style", layers), tmp_path / "x", "peft")
    assert_close(with_peft(net, tmp_path / "x")(ids), merged(net, layers)(ids))


@SAME_FOLDER
@given(data=st.data())
def test_peft_reads_any_ranks_and_alphas(data: st.DataObject, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, ids = Net().eval(), torch.arange(16).reshape(2, 8) % 9
    linear = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    names = data.draw(st.lists(st.sampled_from(linear), min_size=1, unique=True))
    layers = {}
    for name in names:
        rank, alpha = data.draw(st.integers(1, 8)), data.draw(st.floats(-8, 8))
        layers[name] = layer(net.get_submodule(name), rank, alpha, rslora=data.draw(st.booleans()))
    write(Adapter("style", layers), tmp_path / "x", "peft", fold=data.draw(st.booleans()))
    found, expected = with_peft(net, tmp_path / "x")(ids), merged(net, layers)(ids)
    assert_close(found, expected, rtol=1e-3, atol=1e-4)


# LyCORIS


def with_lycoris(model: nn.Module, path: Path, count: int) -> nn.Module:
    model = copy.deepcopy(model)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), model)
    assert len(network.loras) == count
    network.apply_to()
    return model


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("extras", [(), ("dora",), ("tucker",)])
def test_lycoris_gives_our_outputs(
    extras: tuple[str, ...], fold: bool, net: Net, ids: Tensor, tmp_path: Path
) -> None:
    if extras == ("tucker",):
        layers = layers_of(net, ("conv", "along"), *extras) | layers_of(net, LINEAR)
    else:
        layers = layers_of(net, LINEAR + CONV, *extras)
    layers["layers.3.fc"] = layer(
        net.layers[3].fc, 3, 2.0, *extras[:1] if extras == ("dora",) else ()
    )
    write(Adapter("style", layers), tmp_path / "x.safetensors", "lycoris", fold=fold)
    found = with_lycoris(net, tmp_path / "x.safetensors", len(layers))
    assert_close(found(ids), merged(net, layers)(ids), rtol=1e-4, atol=1e-4)


def test_lycoris_reads_an_alpha_of_zero_and_of_rslora(
    net: Net, ids: Tensor, tmp_path: Path
) -> None:
    layers = {
        "fc": layer(net.fc, 2, 0.0),
        "layers.2.fc": layer(net.layers[2].fc, 3, 1.5, rslora=True),
    }
    write(Adapter("style", layers), tmp_path / "x.safetensors", "lycoris")
    found = with_lycoris(net, tmp_path / "x.safetensors", 2)
    assert_close(found(ids), merged(net, layers)(ids))


def test_lycoris_reads_differences(net: Net, ids: Tensor, tmp_path: Path) -> None:
    norm = {"weight": torch.randn(8), "bias": torch.randn(8)}
    whole = {"weight": torch.randn(8, 8), "bias": torch.randn(8)}
    layers = layers_of(net, LINEAR[1:]) | {
        "norm": AdapterLayer("difference", None, norm),
        "fc": AdapterLayer("difference", None, whole),
    }
    write(Adapter("style", layers), tmp_path / "x.safetensors", "lycoris")
    found = with_lycoris(net, tmp_path / "x.safetensors", len(layers))
    assert_close(found(ids), merged(net, layers)(ids), rtol=1e-4, atol=1e-5)


# loralib, which is read alone


def test_loralibs_adapter_is_written_for_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(
        loralib.Linear(6, 8, r=2, lora_alpha=5), loralib.Linear(8, 4, r=3, lora_alpha=5)
    )
    for module in theirs:
        nn.init.normal_(module.lora_B)
    theirs.train()  # not merged
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "x.pt")
    file = read(tmp_path / "x.pt", alpha=5, allow_pickle=True)
    write(file, tmp_path / "x", "peft")
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    plain.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(3, 6)
    assert_close(with_peft(plain, tmp_path / "x")(x), theirs(x))


# diffusers, and the models that kohya's files are of


def clip(width: int, *, projected: bool = False) -> nn.Module:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        max_position_embeddings=16,
        projection_dim=6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def sd15() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        down_block_types=down,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
    )
    return {"unet": unet.eval(), "text_encoder": clip(12)}


def sdxl() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        down_block_types=down,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        transformer_layers_per_block=(1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=30,
    )
    both = {"text_encoder": clip(12), "text_encoder_2": clip(16, projected=True)}
    return {"unet": unet.eval(), **both}


def pipeline(models: Mapping[str, nn.Module]) -> Any:
    scheduler = diffusers.DDIMScheduler()
    if "text_encoder_2" in models:
        return diffusers.StableDiffusionXLPipeline(
            vae=None, tokenizer=None, tokenizer_2=None, scheduler=scheduler, **models
        )
    return diffusers.StableDiffusionPipeline(
        vae=None,
        tokenizer=None,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **models,
    )


def outputs(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 5, 12, generator=generator)
    added = {"text_embeds": torch.ones(1, 6), "time_ids": torch.ones(1, 6)}
    with torch.no_grad():
        found = {"unet": models["unet"](latents, 3, states, added_cond_kwargs=added).sample}
        for name, model in models.items():
            if name != "unet":
                found[name] = model(torch.arange(3, 11)[None]).last_hidden_state
    return found


def targets(models: Mapping[str, nn.Module], *, conv: bool) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for component, model in models.items():
        for name, module in model.named_modules():
            inside = ".attentions." in name or name.endswith(("_proj", "fc1", "fc2"))
            wide = conv and (".resnets." in name or "samplers" in name or name == "conv_in")
            if isinstance(module, nn.Linear | nn.Conv2d) and (inside or wide):
                found.setdefault(component, []).append(name)
    return found


def pipelines_layers(
    models: Mapping[str, nn.Module], *extras: str, conv: bool = True, alike: bool = False
) -> dict[str, AdapterLayer]:
    layers: dict[str, AdapterLayer] = {}
    for component, names in targets(models, conv=conv).items():
        if not alike:
            layers |= layers_of(models[component], names, *extras, component=component)
            continue
        for name in names:
            module = models[component].get_submodule(name)
            layers[f"{component}.{name}"] = layer(
                module, 2, 3.0, *extras, component=component, path=name
            )
    return layers


def expected_of(
    models: Mapping[str, nn.Module], layers: Mapping[str, AdapterLayer]
) -> dict[str, Tensor]:
    mine = {
        component: {n: x for n, x in layers.items() if x.component == component}
        for component in models
    }
    changed = {component: merged(model, mine[component]) for component, model in models.items()}
    found, base = outputs(changed), outputs(models)
    assert all(not torch.allclose(found[key], base[key], atol=1e-3) for key in found)
    return found


# of the projections that have none: PEFT has one setting for all layers
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("extras", [(), ("dora",), ("bias",)])
@pytest.mark.parametrize("make", [sd15, sdxl])
def test_diffusers_reads_its_own_format(
    make: Any, extras: tuple[str, ...], fold: bool, tmp_path: Path
) -> None:
    models = make()
    layers = pipelines_layers(models, *extras)
    expected = expected_of(models, layers)
    write(Adapter("style", layers), tmp_path / "x.safetensors", "diffusers", fold=fold)
    found = pipeline(models)
    found.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    assert_close(outputs(models), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [sd15, sdxl])
def test_diffusers_reads_kohyas_format(make: Any, tmp_path: Path) -> None:
    # of equal alphas: of several, diffusers 0.42 gives all its attention the most frequent one
    models = make()
    layers = pipelines_layers(models, conv=False, alike=True)
    expected = expected_of(models, layers)
    write(Adapter("style", layers), tmp_path / "x.safetensors", "kohya")
    found = pipeline(models)
    found.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    assert_close(outputs(models), expected, rtol=1e-3, atol=1e-4)


def test_a_unet_alone_is_read_by_itself(tmp_path: Path) -> None:
    models = sd15()
    layers = {n: x for n, x in pipelines_layers(models).items() if x.component == "unet"}
    expected = outputs({"unet": merged(models["unet"], layers)})
    bare = {x.path: replace(x, component="", path="") for x in layers.values()}
    write(Adapter("style", bare), tmp_path / "x.safetensors", "diffusers")
    models["unet"].load_lora_adapter(str(tmp_path), weight_name="x.safetensors", prefix="unet")
    assert_close(outputs({"unet": models["unet"]}), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("extras", [(), ("dora",)])
@pytest.mark.parametrize("to", ["kohya", "lycoris"])
def test_lycoris_reads_kohyas_keys_with_an_alpha_of_each_module(
    to: str, extras: tuple[str, ...], tmp_path: Path
) -> None:
    models = sd15()
    layers = pipelines_layers(models, *extras)
    expected = expected_of(models, layers)
    write(Adapter("style", layers), tmp_path / "x.safetensors", to)
    # as LyCORIS itself goes about it, whose own network refuses this UNet for a name it finds twice
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    count = 0
    for component, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te_text_model")):
        for name, module in list(models[component].named_modules()):
            stem = f"{prefix}_{name}".replace(".", "_")
            kind, parameters = modules.get_module(tensors, stem)
            if kind is not None:
                modules.make_module(kind, parameters, stem, module).apply_to()
                count += 1
    assert count == len(layers)
    assert_close(outputs(models), expected, rtol=1e-3, atol=1e-4)
