"""Does it pay to stack the projections of one x? Measured, on a CPU: no.

    python -m benchmarks.shared_projections

Three calls of the fused layer for q, k and v (or two for k and v) against one of
`lora_core.functional.shared_lora_linear`, whose frozen matrix is stacked beforehand; forward and
backward, CPU time of one thread, interleaved. The output is compared before anything is timed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Spread, timed_rounds
from lora_core.functional import fused_lora_linear, shared_lora_linear

SHAPES = (
    # tokens, in, out, rank, projections
    (4096, 320, 320, 4, 3),
    (1024, 640, 640, 4, 3),
    (256, 1280, 1280, 4, 3),
    (77, 768, 320, 4, 2),
)
ROUNDS = 15


def compare(tokens: int, in_features: int, out_features: int, rank: int, count: int) -> Spread:
    """The time of one stacked call over that of a call for each projection."""
    x = torch.randn(tokens, in_features, requires_grad=True)
    weight = torch.randn(count * out_features, in_features)
    own = torch.split(weight, out_features)
    A = [torch.randn(rank, in_features, requires_grad=True) for _ in range(count)]
    B = [torch.randn(out_features, rank, requires_grad=True) for _ in range(count)]
    dy = [torch.randn(tokens, out_features) for _ in range(count)]

    def apart() -> list[Tensor]:
        return [fused_lora_linear(x, W, None, *pair) for W, *pair in zip(own, A, B, strict=True)]

    def stacked() -> list[Tensor]:
        return shared_lora_linear(x, weight, None, A, B, [1.0] * count)

    def trained(forward: Callable[[], list[Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), [x, *A, *B], dy)

    for got, expected in zip(stacked(), apart(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    candidates = {"apart": trained(apart), "stacked": trained(stacked)}
    return timed_rounds(candidates, ROUNDS, baseline="apart").ratio("stacked", "apart")


def main() -> None:
    """Print a line per shape."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for shape in SHAPES:
        tokens, in_features, out_features, rank, count = shape
        ratio = compare(*shape)
        print(
            f"{count} projections of {tokens}x{in_features}->{out_features}, rank {rank}: stacked"
            f" takes {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] of the time apart"
        )


if __name__ == "__main__":
    main()
