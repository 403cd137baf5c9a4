"""How many parameters and bytes an adapter has, counted on real layers and compared.

    python -m benchmarks.parameter_count --ranks 1 4 --plot build/parameter-count.png

Needs matplotlib for `--plot` only, no weights and no network. The U-Nets of Stable Diffusion are
rebuilt from `data/` as layers on the meta device, which have shapes but no memory.
"""

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_core
from benchmarks.options import add_outputs, at_least_one, write_json
from lora_core._files.fingerprint import fingerprint
from lora_core._formats import Adapter, AdapterLayer, native
from lora_core._layers import LoRAMixin, stored_parts

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
SKELETONS = {"Stable Diffusion 1.5 UNet": "sd15_unet", "SDXL UNet": "sdxl_unet"}
_DATA = Path(__file__).parent / "data"
_NORM_GROUPS = 32  # has no bearing on the count


@dataclass(frozen=True, slots=True)
class LayerCount:
    """One linear layer against its update.

    Attributes:
        in_features: Size of the layer's input.
        out_features: Size of the layer's output.
        rank: Inner dimension of the update.
        dense: Numbers in the layer's weight.
        adapter: Numbers in the two factors.
    """

    in_features: int
    out_features: int
    rank: int
    dense: int
    adapter: int


@dataclass(frozen=True, slots=True)
class AdapterCount:
    """An adapter of one rank on the attention layers of a model.

    Attributes:
        rank: Inner dimension of the updates.
        parameters: Numbers in the factors.
        nbytes: Bytes of the float16 file that `lora_core.save` writes.
        ratio: Bytes of the model's float16 checkpoint per byte of that file.
    """

    rank: int
    parameters: int
    nbytes: int
    ratio: float


@dataclass(frozen=True, slots=True)
class ModelCount:
    """A model and its adapters by rank.

    Attributes:
        model: What it is called.
        parameters: Numbers in the model.
        nbytes: Bytes of its float16 checkpoint as a safetensors file.
        layers: How many attention layers carry the adapter.
        max_rank: The highest rank that all of these allow.
        adapters: One entry per rank, `max_rank` at most.
    """

    model: str
    parameters: int
    nbytes: int
    layers: int
    max_rank: int
    adapters: tuple[AdapterCount, ...]


def numbers(parameters: Iterable[Tensor]) -> int:
    """Numbers in all of these together."""
    return sum(p.numel() for p in parameters)


def count_layer(in_features: int = 2000, out_features: int = 1000, rank: int = 2) -> LayerCount:
    """Counts the parameters of a real `nn.Linear` and of a `LoRALinear` around it."""
    linear = nn.Linear(in_features, out_features, bias=False)
    dense = numbers(linear.parameters())
    layer = lora_core.LoRALinear(linear, rank=rank)
    adapter = numbers(p for p in layer.parameters() if p.requires_grad)
    return LayerCount(in_features, out_features, rank, dense, adapter)


def skeleton(stem: str) -> nn.Module:
    """The model of ``data/<stem>.json`` on the meta device: true names, layers and shapes.

    It has no forward, and its convolutions no stride or padding, which hold no parameters.

    Raises:
        ValueError: If its parameters don't add up to the total in the file.
    """
    data = json.loads((_DATA / f"{stem}.json").read_text())
    model = nn.Module()
    for name, (kind, weight, bias) in data["modules"].items():
        parent = model
        *path, leaf = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, _layer(kind, weight, bias is not None))
    total = numbers(model.parameters())
    if total != data["parameter_count"]:
        raise ValueError(
            f"The layers of {stem!r} must have {data['parameter_count']:,} parameters, but have"
            f" {total:,}. Restore the data file."
        )
    return model


def _layer(kind: str, weight: Sequence[int], bias: bool) -> nn.Module:
    with torch.device("meta"):
        if kind == "Linear":
            return nn.Linear(weight[1], weight[0], bias=bias)
        if kind == "Conv2d":
            kernel = (weight[2], weight[3])
            return nn.Conv2d(weight[1], weight[0], kernel, bias=bias)
        if kind == "GroupNorm":
            return nn.GroupNorm(_NORM_GROUPS, weight[0])
        if kind == "LayerNorm":
            return nn.LayerNorm(weight[0])
    raise ValueError(
        f"`kind` must be Linear, Conv2d, GroupNorm or LayerNorm, but is {kind!r}."
        " Restore the data file."
    )


def file_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Bytes of the float16 safetensors file of these tensors, which may be on the meta device.

    The header is built as text, for its length depends on every name, shape and offset; the
    tensors behind it are counted at two bytes a number.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.numel() * torch.float16.itemsize
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    size = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return struct.calcsize("<Q") + math.ceil(size / 8) * 8 + end


def adapter_bytes(model: nn.Module, name: str = "default") -> int:
    """Bytes that `lora_core.save` would write for this adapter, were its factors float16."""
    hosts = {n: m for n, m in model.named_modules() if isinstance(m, LoRAMixin)}
    layers = {}
    for host_name, host in hosts.items():
        config = host.lora_state.configs[name]
        layers[host_name] = AdapterLayer(host.lora_kind.name, config, stored_parts(host, name))
    return file_bytes(*native.encode(Adapter(name, layers, fingerprint(hosts), {})))


def count_model(title: str, model: nn.Module, ranks: Sequence[int]) -> ModelCount:
    """Adapts the attention layers of `model` at each rank that fits, counts, and takes it off."""
    parameters = numbers(model.parameters())
    nbytes = file_bytes(model.state_dict(), {"format": "pt"})
    attention = lora_core.plan(model, rank=1).layers
    max_rank = min(min(layer.in_features, layer.out_features) for layer in attention)
    adapters = []
    for rank in ranks:
        if rank > max_rank:
            continue
        lora_core.inject(model, rank=rank, dtype=torch.float16)
        added = numbers(lora_core.parameters(model))
        size = adapter_bytes(model)
        lora_core.eject(model)
        adapters.append(AdapterCount(rank, added, size, nbytes / size))
    return ModelCount(title, parameters, nbytes, len(attention), max_rank, tuple(adapters))


def count_models(ranks: Sequence[int] = RANKS) -> list[ModelCount]:
    """The reference U-Net and those of Stable Diffusion, each at these ranks."""
    from lora_core.models import UNet

    return [
        count_model("reference UNet", UNet(), ranks),
        *(count_model(title, skeleton(stem), ranks) for title, stem in SKELETONS.items()),
    ]


def as_text(layer: LayerCount, models: Sequence[ModelCount], ranks: Sequence[int]) -> str:
    """The counts as tables, sizes in MB of 1,000,000 bytes; says which `ranks` didn't fit."""
    lines = [
        f"nn.Linear({layer.in_features}, {layer.out_features}, bias=False):"
        f" {layer.dense:,} parameters",
        f"LoRALinear at rank {layer.rank}: {layer.adapter:,} parameters,"
        f" {layer.dense / layer.adapter:.0f} times fewer",
    ]
    for m in models:
        lines += [
            "",
            f"{m.model}: {m.parameters:,} parameters, fp16 checkpoint {m.nbytes / 1e6:,.2f} MB",
            f"adapter on its {m.layers} attention layers:",
            f"{'rank':>6}{'parameters':>14}{'share':>9}{'fp16 file':>14}{'checkpoint / file':>20}",
        ]
        lines += [
            f"{a.rank:>6}{a.parameters:>14,}{a.parameters / m.parameters:>9.3%}"
            f"{a.nbytes / 1e6:>11,.3f} MB{a.ratio:>20,.1f}"
            for a in m.adapters
        ]
        too_high = [str(rank) for rank in ranks if rank > m.max_rank]
        if too_high:
            limit = f"its narrowest attention layer allows {m.max_rank} at most"
            lines.append(f"  no rank {', '.join(too_high)}: {limit}")
    return "\n".join(lines)


def plot(models: Sequence[ModelCount], path: Path) -> None:
    """Draws adapter size over rank for each model, with its checkpoint size as a dashed line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ranks = sorted({a.rank for m in models for a in m.adapters})
    for m, color, marker in zip(models, ("#555555", "#0072b2", "#d55e00"), "so^", strict=True):
        axes.axhline(m.nbytes / 1e6, color=color, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{m.model}: whole checkpoint, {m.nbytes / 1e6:,.1f} MB",
            (0.988, m.nbytes / 1e6),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=color,
            fontsize=9,
            ha="right",
        )
        axes.plot(
            [a.rank for a in m.adapters],
            [a.nbytes / 1e6 for a in m.adapters],
            color=color,
            marker=marker,
            linewidth=1.8,
            label=f"{m.model}, adapter on {m.layers} layers",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylim(top=max(m.nbytes for m in models) / 1e6 * 3)
    axes.set_xlabel("rank of the adapter")
    axes.set_ylabel("float16 file size (MB, 1 MB = 1,000,000 bytes)")
    axes.set_title("An adapter on all attention layers against the model it adapts")
    axes.grid(alpha=0.25)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=1, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, and writes what else is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parameter_count",
        description="Count the parameters and bytes of adapters against those of their models.",
    )
    parser.add_argument(
        "--ranks", type=at_least_one("a rank"), nargs="+", default=RANKS, metavar="RANK"
    )
    add_outputs(parser, "counts", "file sizes")
    arguments = parser.parse_args(argv)
    ranks = sorted(set(arguments.ranks))
    layer, models = count_layer(), count_models(ranks)
    if not any(m.adapters for m in models):
        most = max(m.max_rank for m in models)
        parser.error(
            f"argument --ranks: a rank must be at most {most} for any of these models, but the"
            f" lowest is {ranks[0]}"
        )
    if arguments.json != "-":
        print(as_text(layer, models, ranks))
    if arguments.json:
        counts = {"layer": asdict(layer), "models": [asdict(m) for m in models]}
        write_json(counts, arguments.json, indent=2)
    if arguments.plot:
        plot(models, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
