"""Files that other programs wrote, and the models they belong to, rebuilt from plain torch."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "data" / "golden"
NAMES = ("lora.safetensors", "lycoris.safetensors", "pytorch_lora_weights.safetensors", "lora.pt")
COMPONENTS = {"te1": "text_encoder", "te2": "text_encoder_2"}


def cases() -> list[str]:
    """The golden cases that are LoRA."""
    return sorted(
        str(case.parent.relative_to(GOLDEN))
        for case in GOLDEN.glob("*/*/case.json")
        if not case.parent.name.startswith("refuse_")
    )


def file_of(case: Path, about: Mapping[str, Any]) -> Path:
    """The adapter of a case: a file, or a folder of PEFT's."""
    if about["peer"] == "peft":
        return case
    return next(case / name for name in NAMES if (case / name).exists())


def weights_of(case: Path, about: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The base's tensors by component, in the order of the model's modules; "" for a plain one."""
    if "base" not in about:
        return {"": safetensors.torch.load_file(case / "base.safetensors")}
    stem = Path(about["base"][0]).name.partition("_unet")[0]
    skeleton = json.loads((GOLDEN / "diffusers_base" / f"{stem}_skeleton.json").read_text())
    found = {}
    for file in about["base"]:
        part = Path(file).stem.rpartition("_")[2]
        weights = safetensors.torch.load_file(GOLDEN / file)
        names = (
            [f"{name}.weight" for name in skeleton["unet_modules"]]
            if part == "unet"
            else list(skeleton["text_modules"][part])
        )
        # some files count the modules
        found[COMPONENTS.get(part, part)] = {key: weights[key] for key in names} | weights
    return found


def models_of(case: Path, about: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The base models of a case by component, "" for a plain one, with the peer's weights."""
    found = weights_of(case, about)
    if "base" in about or about["peer"] == "loralib":
        transposed = about.get("fan_in_fan_out", ())
        return {part: tree(weights, transposed) for part, weights in found.items()}
    model = TinyMix()
    model.load_state_dict(found[""])
    return {"": model}


def tree(weights: Mapping[str, Tensor], transposed: Sequence[str] = ()) -> nn.Module:
    """Modules with these weights under these names, in their order; no model that could be run."""
    root = nn.Module()
    for key, weight in weights.items():
        name, _, kind = key.rpartition(".")
        if kind != "weight":
            continue
        bias = weights.get(f"{name}.bias")
        layer = layer_of(weight, name, bias is not None, transposed)
        layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        *parents, last = name.split(".")
        at = root
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(last, layer)
    return root


def layer_of(weight: Tensor, name: str, has_bias: bool, transposed: Sequence[str]) -> nn.Module:
    """A layer with a weight of this shape."""
    if weight.ndim == 1:
        return nn.LayerNorm(weight.shape[0], bias=has_bias)
    if name == "emb" or name.endswith(("token_embedding", "position_embedding")):
        return nn.Embedding(*weight.shape)
    if name in transposed:
        return Conv1D(weight.shape[1], weight.shape[0])
    if weight.ndim == 4:
        out, size, *kernel = weight.shape
        return nn.Conv2d(size, out, (kernel[0], kernel[1]), bias=has_bias)
    return nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias)


def grown(key: str, models: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The component and parameter that a key of a peer's deltas is of."""
    if "" in models:
        return "", key
    part, _, path = key.partition(".")
    if part == "text_model":  # a text encoder's own
        part, path = "te1", key
    return COMPONENTS.get(part, part), path.removeprefix("text_model.")


class Attention(nn.Module):
    """Self-attention of one head, with the names of diffusers'."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        scores = self.to_q(x) @ self.to_k(x).mT / math.sqrt(x.shape[-1])
        out: Tensor = self.to_out[0](scores.softmax(-1) @ self.to_v(x))
        return out


class Projection(nn.Module):
    """A linear layer and its activation."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class FeedForward(nn.Module):
    """Two layers, with the names of diffusers'."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers = [Projection(dim, 2 * dim), nn.Dropout(0.0), nn.Linear(2 * dim, dim)]
        self.net = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.ff, self.norm_1 = Attention(dim), FeedForward(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        out: Tensor = x + self.ff(x)
        return out


class TinyMix(nn.Module):
    """Every kind of layer that peers adapt, under names with dots, digits and underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin_in = nn.Embedding(11, 12), nn.Linear(12, 16)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.head = nn.Linear(16, 5)
        self.conv_in, self.conv_1x1 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.conv_down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.gn = nn.GroupNorm(2, 8)

    def forward(self, ids: Tensor, img: Tensor) -> dict[str, Tensor]:
        x = self.lin_in(self.emb(ids))
        for block in self.blocks:
            x = block(x)
        image = F.silu(self.conv_1x1(F.silu(self.conv_in(img))))
        return {"seq": self.head(x), "img": self.conv_down(self.gn(image))}


class Conv1D(nn.Module):
    """GPT-2's layer, which stores its matrix (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias
