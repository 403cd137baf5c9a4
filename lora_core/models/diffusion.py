"""Gaussian diffusion: noise schedules, the training loss, and two samplers.

Notation: ``alpha_bar`` is the running product of ``1 - beta``, timesteps are ``0 .. T - 1``, and
``z_t = sqrt(alpha_bar_t) * z_0 + sqrt(1 - alpha_bar_t) * eps``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_core.models._checks import check_floating, check_indices

Model = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A noise prediction ``eps(z_t, t, context)``, such as a `UNet`."""

Progress = Callable[[int, int], object]
"""Told after each step how many are done, and of how many."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise each timestep adds.

    The coefficients are kept in float64, because ``1 - alpha_bar`` at small t and the products
    over a thousand steps lose half their digits in float32; they are rounded once, where they
    multiply an image.

    Args:
        betas: Variance added by each step, strictly between 0 and 1.

    Shape:
        - betas: ``(T,)``

    Raises:
        ValueError: If `betas` has another shape or leaves that range.
        TypeError: If it is no tensor.

    Example:
        >>> schedule = Schedule.linear(1000)
        >>> len(schedule), schedule.alphas_cumprod.shape
        (1000, torch.Size([1000]))
    """

    betas: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.betas, Tensor):
            raise TypeError(
                f"`betas` must be a tensor, but is a {type(self.betas).__name__}."
                " Pass `torch.tensor(betas)`."
            )
        if self.betas.ndim != 1 or len(self.betas) == 0:
            raise ValueError(f"`betas` must have shape (T,), but has {tuple(self.betas.shape)}.")
        low, high = (float(extreme) for extreme in self.betas.aminmax())
        if not 0 < low <= high < 1:
            raise ValueError(
                f"`betas` must lie strictly between 0 and 1, but is from {low:g} to {high:g}."
            )
        object.__setattr__(self, "betas", self.betas.double().cpu())

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> "Schedule":
        """Variances in equal increments (Ho et al., 2020, section 4)."""
        _check_steps(steps)
        return cls(torch.linspace(first, last, steps, dtype=torch.float64))

    @classmethod
    def cosine(cls, steps: int = 1000, offset: float = 0.008, limit: float = 0.999) -> "Schedule":
        """``alpha_bar`` as a squared cosine (Nichol and Dhariwal, 2021, section 3.2)."""
        _check_steps(steps)
        s = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((s + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=limit))

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """``alpha_bar``: the share of the variance that is still signal, ``(T,)``."""
        return torch.cumprod(1 - self.betas, dim=0)

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """``sqrt(alpha_bar_t)`` and ``sqrt(1 - alpha_bar_t)``, shaped to multiply `like`.

        Shape:
            - t: integers, ``(batch,)``
            - like: ``(batch, ...)``
            - Output: two of ``(batch, 1, ...)``, in the dtype of `like`

        Raises:
            ValueError: If `t` has another shape or is no timestep of this schedule.
            TypeError: If `t` is not of integers, or `like` is not floating.
        """
        check_floating("like", like)
        if t.shape != like.shape[:1]:
            raise ValueError(f"`t` must have shape ({like.shape[0]},), but has {tuple(t.shape)}.")
        check_indices("t", t, len(self))
        alpha_bar = self.alphas_cumprod.to(t.device)[t].reshape(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)


def q_sample(schedule: Schedule, z0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Noise `z0` to timestep `t` in one step.

    ``z_t = sqrt(alpha_bar_t) * z_0 + sqrt(1 - alpha_bar_t) * noise``

    Shape:
        - z0, noise: ``(batch, ...)``
        - t: integers, ``(batch,)``
        - Output: the shape of `z0`

    Raises:
        ValueError: If a shape does not fit, or `t` is no timestep of the schedule.
        TypeError: If `z0` is not floating, or `t` is not of integers.

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020, equation 4.

    Example:
        >>> z0 = torch.zeros(2, 1, 28, 28)
        >>> q_sample(Schedule.linear(), z0, torch.tensor([0, 999]), torch.randn_like(z0)).shape
        torch.Size([2, 1, 28, 28])
    """
    check_floating("z0", z0)
    if noise.shape != z0.shape:
        raise ValueError(
            f"`noise` must have the shape of `z0` = {tuple(z0.shape)}, "
            f"but has {tuple(noise.shape)}."
        )
    signal_rate, noise_rate = schedule.signal_and_noise(t, z0)
    return signal_rate * z0 + noise_rate * noise


def noise_prediction_loss(
    model: Model,
    schedule: Schedule,
    z0: Tensor,
    context: Tensor,
    *,
    largest_weight: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean squared error of the predicted noise at random timesteps.

    ``mean(w_t * (eps - model(z_t, t, context)) ** 2)`` with t uniform and eps normal, both from
    `generator`. The weight is 1, or, with a `largest_weight`,
    ``min(largest_weight, sqrt((1 - alpha_bar_t) / alpha_bar_t))``: what is drawn, and how boldly,
    is settled where there is much noise, and there the plain loss hardly looks.

    Shape:
        - z0: ``(batch, ...)``
        - context: ``(batch, tokens, context_dim)``
        - Output: a number

    Raises:
        ValueError: If the prediction's shape is not that of `z0`, or `largest_weight` is not
            positive.
        TypeError: If `z0` is not floating.

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020, equation 14.
    """
    check_floating("z0", z0)
    if largest_weight is not None and not largest_weight > 0:
        raise ValueError(f"`largest_weight` must be greater than 0, but is {largest_weight:g}.")
    device = generator.device if generator is not None else z0.device
    t = torch.randint(len(schedule), z0.shape[:1], generator=generator, device=device)
    noise = torch.randn(z0.shape, generator=generator, device=device, dtype=z0.dtype)
    t, noise = t.to(z0.device), noise.to(z0.device)
    prediction = _predicted(model, q_sample(schedule, z0, t, noise), t, context)
    if largest_weight is None:
        return F.mse_loss(prediction, noise)
    signal_rate, noise_rate = schedule.signal_and_noise(t, z0)
    weight = (noise_rate / signal_rate).clamp(max=largest_weight)
    return (weight * (prediction - noise).square()).mean()


def guided(
    model: Model, z: Tensor, t: Tensor, context: Tensor, guidance: float, null: Tensor | None
) -> Tensor:
    """The noise prediction, pushed away from the unconditional one.

    ``eps_null + guidance * (eps_context - eps_null)``: 1 is the plain conditional prediction
    (and needs no second one), 0 the unconditional.

    Shape:
        - z: ``(batch, ...)``
        - t: ``(batch,)``
        - context, null: ``(batch, tokens, context_dim)``; the batch of `null` may be 1
        - Output: the shape of `z`

    Raises:
        ValueError: If guidance needs `null` and it is missing, or a shape does not fit.

    Reference:
        Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, equation 6, where their
        w is ``guidance - 1``.
    """
    if guidance == 1:
        return _predicted(model, z, t, context)
    if null is None:
        raise ValueError(
            f"`null_context` must be given when `guidance` differs from 1, but is None and "
            f"`guidance` is {guidance:g}. Pass the encoder's context for the null label."
        )
    if null.shape[1:] != context.shape[1:] or null.shape[0] not in {1, context.shape[0]}:
        raise ValueError(
            f"`null_context` must have the shape of `context` = {tuple(context.shape)}, "
            f"but has {tuple(null.shape)}. Its batch may be 1."
        )
    both = torch.cat([context, null.expand_as(context)])
    eps, eps_null = _predicted(model, torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
    return eps_null + guidance * (eps - eps_null)


def sample_ddpm(
    model: Model,
    schedule: Schedule,
    context: Tensor,
    *,
    shape: Sequence[int] = (1, 28, 28),
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    guidance: float = 1.0,
    null_context: Tensor | None = None,
    clip: float | None = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Ancestral sampling: every timestep, with fresh noise at each.

    The arguments are those of `sample_ddim`.

    Shape:
        - context: ``(batch, tokens, context_dim)``
        - Output: ``(batch, *shape)``

    Reference:
        Ho et al., "Denoising Diffusion Probabilistic Models", 2020, algorithm 2.

    Example:
        >>> def silent(z, t, context):
        ...     return torch.zeros_like(z)
        >>> sample_ddpm(silent, Schedule.linear(10), torch.zeros(2, 4, 64)).shape
        torch.Size([2, 1, 28, 28])
    """
    # eta = 1 over all timesteps is algorithm 2 with the posterior's variance
    return sample_ddim(
        model,
        schedule,
        context,
        steps=len(schedule),
        eta=1.0,
        shape=shape,
        noise=noise,
        generator=generator,
        guidance=guidance,
        null_context=null_context,
        clip=clip,
        progress=progress,
    )


@torch.no_grad()
def sample_ddim(
    model: Model,
    schedule: Schedule,
    context: Tensor,
    *,
    steps: int = 25,
    eta: float = 0.0,
    shape: Sequence[int] = (1, 28, 28),
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    guidance: float = 1.0,
    null_context: Tensor | None = None,
    clip: float | None = 1.0,
    progress: Progress | None = None,
) -> Tensor:
    """Sample in few steps; with `eta` 0, a deterministic function of the starting noise.

    Args:
        model: The noise prediction.
        schedule: The schedule the model was trained with.
        context: What to sample.
        steps: Timesteps visited, spread evenly and ending the schedule exactly.
        eta: Fresh noise per step, from 0 (none) to 1 (as much as ancestral sampling).
        shape: Shape of one sample.
        noise: Where to start, instead of drawing it.
        generator: Source of all randomness.
        guidance: Strength of classifier-free guidance; 1 is none.
        null_context: The context that stands for no condition.
        clip: Bound on the predicted ``z_0``; None for data without one.
        progress: Called after each step with the steps done and their total.

    Shape:
        - context: ``(batch, tokens, context_dim)``
        - Output: ``(batch, *shape)``

    Raises:
        ValueError: If `steps`, `eta` or a shape does not fit, that of the prediction included.
        TypeError: If `steps` is no integer.

    Reference:
        Song et al., "Denoising Diffusion Implicit Models", 2021, equations 12 and 16.

    Example:
        >>> def silent(z, t, context):
        ...     return torch.zeros_like(z)
        >>> sample_ddim(silent, Schedule.linear(), torch.zeros(2, 4, 64), steps=5).shape
        torch.Size([2, 1, 28, 28])
    """
    _check_integer(steps)
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"`steps` must be from 1 to {len(schedule)}, but is {steps}.")
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be from 0 to 1, but is {eta:g}.")
    # counted from the last timestep, so that sampling starts where training saw pure noise
    visited = [round(len(schedule) * (steps - i) / steps) - 1 for i in range(steps)]
    expected = (context.shape[0], *shape)
    if noise is not None and tuple(noise.shape) != expected:
        raise ValueError(f"`noise` must have shape {expected}, but has {tuple(noise.shape)}.")

    def draw() -> Tensor:
        device = generator.device if generator is not None else context.device
        drawn = torch.randn(expected, generator=generator, device=device, dtype=context.dtype)
        return drawn.to(context.device)

    z = draw() if noise is None else noise
    alpha_bars = [*schedule.alphas_cumprod[visited].tolist(), 1.0]
    for i, step in enumerate(visited):
        now, then = alpha_bars[i], alpha_bars[i + 1]
        t = torch.full((len(z),), step, device=z.device)
        eps = guided(model, z, t, context, guidance, null_context)
        z0 = (z - math.sqrt(1 - now) * eps) / math.sqrt(now)
        if clip is not None:
            z0 = z0.clamp(-clip, clip)
            # the noise that agrees with the clipped picture
            eps = (z - math.sqrt(now) * z0) / math.sqrt(1 - now)
        fresh = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        z = math.sqrt(then) * z0 + math.sqrt(max(1 - then - fresh**2, 0.0)) * eps
        if fresh > 0:
            z = z + fresh * draw()
        if progress is not None:
            progress(i + 1, steps)
    return z


def _predicted(model: Model, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """The prediction, which must not broadcast."""
    eps = model(z, t, context)
    if eps.shape != z.shape:
        raise ValueError(
            f"`model` must return the shape of `z` = {tuple(z.shape)}, "
            f"but returns {tuple(eps.shape)}."
        )
    return eps


def _check_integer(steps: int) -> None:
    if not hasattr(steps, "__index__"):
        raise TypeError(f"`steps` must be an integer, but is {steps!r}.")


def _check_steps(steps: int) -> None:
    _check_integer(steps)
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1, but is {steps}.")
