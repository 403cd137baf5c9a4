"""Diffusion: the closed form is the chain, and the samplers undo it."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lora_core.models import (
    Schedule,
    noise_prediction_loss,
    q_sample,
    sample_ddim,
    sample_ddpm,
)
from lora_core.models.diffusion import guided

SCHEDULES = {
    "linear": Schedule.linear(200),
    "cosine": Schedule.cosine(200),
    "single step": Schedule.linear(1),
}
CONTEXT = torch.zeros(4, 3, 5, dtype=torch.float64)
SHAPE = (1, 6, 6)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4) -> Tensor:
    return torch.rand(count, *SHAPE, generator=seeded(9), dtype=torch.float64) * 2 - 1


class Perfect:
    """Knows the picture behind every noisy one, and so its noise."""

    def __init__(self, schedule: Schedule, z0: Tensor) -> None:
        self.schedule, self.z0 = schedule, z0

    def __call__(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        signal, noise = self.schedule.signal_and_noise(t, z)
        return (z - signal * self.z0) / noise


def linear_model(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return 0.3 * z + context.mean(dim=(1, 2))[:, None, None, None] + 1e-4 * t[0]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_closed_form_has_the_mean_and_variance_of_the_iterated_chain(
    schedule: Schedule,
) -> None:
    mean, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    for step, beta in enumerate(schedule.betas):
        # one step of the chain: z <- sqrt(1 - beta) * z + sqrt(beta) * fresh noise
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
        t = torch.tensor([step])
        assert_close(q_sample(schedule, one, t, 0 * one)[0], mean)
        assert_close(q_sample(schedule, 0 * one, t, one)[0] ** 2, variance)


def test_the_closed_form_has_the_distribution_of_a_simulated_chain() -> None:
    schedule, count, generator = Schedule.linear(50, last=0.1), 20_000, seeded()
    chain = torch.full((count,), 0.7, dtype=torch.float64)
    for beta in schedule.betas[:30]:
        fresh = torch.randn(count, generator=generator, dtype=torch.float64)
        chain = (1 - beta).sqrt() * chain + beta.sqrt() * fresh
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    z0, t = torch.full((count,), 0.7, dtype=torch.float64), torch.full((count,), 29)
    direct = q_sample(schedule, z0, t, noise)
    # five standard errors of a mean of so many draws
    close = 5 * 2**0.5 / count**0.5
    assert_close(direct.mean(), chain.mean(), rtol=0, atol=close)
    assert_close(direct.var(), chain.var(), rtol=0, atol=2 * close)


@pytest.mark.parametrize("schedule", [Schedule.linear(), Schedule.cosine()], ids=["linear", "cos"])
def test_signal_only_falls_from_almost_all_to_almost_none(schedule: Schedule) -> None:
    alpha_bar = schedule.alphas_cumprod
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[0] > 0.999
    assert alpha_bar[-1] < 1e-4


def test_signal_and_noise_share_a_variance_of_one() -> None:
    for schedule in SCHEDULES.values():
        t = torch.arange(len(schedule))
        signal, noise = schedule.signal_and_noise(t, torch.zeros(len(t), 1, dtype=torch.float64))
        assert_close(signal**2 + noise**2, torch.ones_like(signal))


def test_the_cosine_schedule_is_a_squared_cosine_until_its_limit() -> None:
    steps, s = 200, 0.008
    u = (torch.arange(1, steps, dtype=torch.float64) / steps + s) / (1 + s) * torch.pi / 2
    start = torch.cos(torch.tensor(s / (1 + s) * torch.pi / 2, dtype=torch.float64)) ** 2
    assert_close(Schedule.cosine(steps).alphas_cumprod[:-1], u.cos() ** 2 / start)


def test_a_perfect_predictor_has_no_loss_and_a_silent_one_that_of_the_noise() -> None:
    schedule, z0 = SCHEDULES["linear"], images(64)
    context = CONTEXT[:1].expand(64, -1, -1)
    perfect = noise_prediction_loss(Perfect(schedule, z0), schedule, z0, context)
    assert_close(perfect, torch.zeros_like(perfect))
    silent = noise_prediction_loss(lambda z, t, c: 0 * z, schedule, z0, context)
    assert_close(silent.item(), 1.0, rtol=0, atol=0.1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_a_weighted_loss_weighs_noise_over_signal_up_to_its_largest_weight(beta: float) -> None:
    schedule, z0 = Schedule(torch.tensor([beta])), images()
    weight = (beta / (1 - beta)) ** 0.5

    def loss(**chosen: float) -> Tensor:
        return noise_prediction_loss(
            linear_model, schedule, z0, CONTEXT, generator=seeded(), **chosen
        )

    plain = loss()
    assert_close(loss(largest_weight=10.0), weight * plain, rtol=1e-6, atol=0)
    assert_close(loss(largest_weight=0.9 * weight), 0.9 * weight * plain, rtol=1e-6, atol=0)


def test_a_weighted_loss_sees_every_sample_at_its_own_timestep() -> None:
    schedule, z0 = SCHEDULES["linear"], images()
    t = torch.randint(len(schedule), (4,), generator=seeded())
    weight = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()[t].clamp(max=5)
    # drawing the noise by itself: the prediction is zero, so the error is the noise
    generator = seeded()
    torch.randint(len(schedule), (4,), generator=generator)
    noise = torch.randn(z0.shape, generator=generator, dtype=z0.dtype)
    expected = (weight * noise.square().mean(dim=(1, 2, 3))).mean()
    silent = noise_prediction_loss(
        lambda z, t, c: 0 * z, schedule, z0, CONTEXT, largest_weight=5.0, generator=seeded()
    )
    assert_close(silent, expected)


def test_the_loss_is_reproducible_and_differentiable() -> None:
    z0 = images().requires_grad_()
    losses = [
        noise_prediction_loss(
            linear_model, SCHEDULES["linear"], z0, CONTEXT, generator=seeded(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert_close(losses[0], losses[1], rtol=0, atol=0)
    assert losses[0] != losses[2]
    assert torch.autograd.grad(losses[0], z0)[0].abs().sum() > 0


@pytest.mark.parametrize("steps", [1, 7, 200])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_ddim_with_a_perfect_predictor_recovers_the_picture(
    kind: str, clip: float | None, eta: float, steps: int
) -> None:
    schedule, z0 = SCHEDULES[kind], images()
    model = Perfect(schedule, z0)
    drawn = sample_ddim(model, schedule, CONTEXT, steps=steps, eta=eta, shape=SHAPE, clip=clip)
    assert_close(drawn, z0, rtol=0, atol=1e-6)


def test_ancestral_sampling_with_a_perfect_predictor_recovers_the_picture() -> None:
    schedule, z0 = SCHEDULES["linear"], images()
    drawn = sample_ddpm(Perfect(schedule, z0), schedule, CONTEXT, shape=SHAPE)
    assert_close(drawn, z0, rtol=0, atol=1e-6)


def test_sampling_gaussian_data_with_the_best_predictor_has_its_mean_and_variance() -> None:
    # for data N(m, s^2) the best noise prediction is known exactly
    schedule, m, s, count = Schedule.linear(1000), 0.4, 0.5, 4000
    context = torch.zeros(count, 1, 1, dtype=torch.float64)

    def best(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        signal, noise = schedule.signal_and_noise(t, z)
        return noise * (z - signal * m) / (signal**2 * s**2 + noise**2)

    # both discretise the reverse process, so the spread is right in the limit of many steps
    for sample in (sample_ddpm, partial(sample_ddim, steps=1000)):
        drawn = sample(best, schedule, context, shape=(1,), clip=None, generator=seeded())
        assert_close(drawn.mean().item(), m, rtol=0, atol=0.03)
        assert_close(drawn.std().item(), s, rtol=0, atol=0.03)


def test_ddim_without_eta_is_a_function_of_the_starting_noise() -> None:
    schedule = SCHEDULES["linear"]
    noise = torch.randn(4, *SHAPE, generator=seeded(), dtype=torch.float64)
    kwargs = {"steps": 5, "shape": SHAPE, "noise": noise}
    first, again = (sample_ddim(linear_model, schedule, CONTEXT, **kwargs) for _ in range(2))
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(
        first, sample_ddim(linear_model, schedule, CONTEXT, **{**kwargs, "noise": -noise})
    )
    assert not torch.equal(first, sample_ddim(linear_model, schedule, CONTEXT, eta=0.5, **kwargs))


@pytest.mark.parametrize("sample", [sample_ddim, sample_ddpm])
def test_the_same_generator_seed_gives_the_same_samples(sample: object) -> None:
    drawn = [
        sample(linear_model, SCHEDULES["linear"], CONTEXT, shape=SHAPE, generator=seeded(seed))
        for seed in (0, 0, 1)
    ]
    assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    assert not torch.equal(drawn[0], drawn[2])


def test_ancestral_sampling_is_algorithm_2_of_ho_et_al() -> None:
    schedule, generator = SCHEDULES["linear"], seeded()
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod])
    z = torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64)
    for step in reversed(range(len(schedule))):
        beta = schedule.betas[step]
        eps = linear_model(z, torch.full((4,), step), CONTEXT)
        z = (z - beta / (1 - alpha_bar[step + 1]).sqrt() * eps) / (1 - beta).sqrt()
        if step > 0:
            variance = (1 - alpha_bar[step]) / (1 - alpha_bar[step + 1]) * beta
            z += variance.sqrt() * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    drawn = sample_ddpm(linear_model, schedule, CONTEXT, shape=SHAPE, generator=seeded(), clip=None)
    assert_close(drawn, z)


def test_guidance_mixes_the_conditional_and_the_unconditional_prediction() -> None:
    z, t = images(), torch.full((4,), 3)
    context, null = CONTEXT + 1.0, CONTEXT[:1] - 2.0
    with_label = linear_model(z, t, context)
    without = linear_model(z, t, null.expand(4, -1, -1))
    for guidance, expected in {
        1.0: with_label,
        0.0: without,
        2.5: without + 2.5 * (with_label - without),
    }.items():
        assert_close(guided(linear_model, z, t, context, guidance, null), expected)


def test_without_guidance_the_null_context_plays_no_part() -> None:
    schedule = SCHEDULES["linear"]
    kwargs = {"shape": SHAPE, "steps": 4}
    plain, unused, guided_ = (
        sample_ddim(linear_model, schedule, CONTEXT, generator=seeded(), **kwargs, **more)
        for more in (
            {},
            {"null_context": CONTEXT + 1},
            {"null_context": CONTEXT + 1, "guidance": 2.0},
        )
    )
    assert_close(plain, unused, rtol=0, atol=0)
    assert not torch.equal(plain, guided_)


def test_progress_is_told_every_step() -> None:
    told: list[tuple[int, int]] = []
    sample_ddim(
        linear_model,
        SCHEDULES["linear"],
        CONTEXT,
        steps=3,
        shape=SHAPE,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_ddim_visits_the_last_timestep_first_and_never_one_twice() -> None:
    for steps in (1, 3, 7, 199, 200):
        seen: list[int] = []

        def watch(z: Tensor, t: Tensor, context: Tensor, seen: list[int] = seen) -> Tensor:
            seen.append(int(t[0]))
            return z

        sample_ddim(watch, SCHEDULES["linear"], CONTEXT, steps=steps, shape=SHAPE)
        assert seen[0] == 199
        assert seen == sorted(set(seen), reverse=True)
        assert len(seen) == steps
        assert seen[-1] >= 0


def test_values_out_of_range_are_refused() -> None:
    schedule = SCHEDULES["linear"]
    with pytest.raises(ValueError, match=r"^`steps` must be from 1 to 200, but is 201\.$"):
        sample_ddim(linear_model, schedule, CONTEXT, steps=201)
    with pytest.raises(ValueError, match=r"^`eta` must be from 0 to 1, but is 2\.$"):
        sample_ddim(linear_model, schedule, CONTEXT, eta=2)
    with pytest.raises(ValueError, match=r"^`steps` must be at least 1, but is 0\.$"):
        Schedule.linear(0)
    with pytest.raises(
        ValueError, match=r"^`betas` must lie strictly between 0 and 1, but is from"
    ):
        Schedule(torch.tensor([0.1, 1.0]))
    with pytest.raises(TypeError, match=r"^`betas` must be a tensor, but is a list\. Pass `torch"):
        Schedule([0.1])
    for sample in (
        partial(sample_ddim, linear_model, schedule, CONTEXT),
        Schedule.linear,
    ):
        with pytest.raises(TypeError, match=r"^`steps` must be an integer, but is 2\.5\.$"):
            sample(steps=2.5)
    for weight in (-1.0, 0.0, torch.nan):
        with pytest.raises(ValueError, match=r"^`largest_weight` must be greater than 0, but is"):
            noise_prediction_loss(linear_model, schedule, images(), CONTEXT, largest_weight=weight)


@pytest.mark.parametrize("step", [-1, 200])
def test_a_timestep_outside_the_schedule_is_refused(step: int) -> None:
    z0 = images()
    with pytest.raises(ValueError, match=rf"^`t` must be from 0 to 199, but is {step}\.$"):
        q_sample(SCHEDULES["linear"], z0, torch.tensor([0, step, 1, 2]), z0)


def test_whole_numbers_are_refused_as_an_image_and_others_as_timesteps() -> None:
    schedule, t = SCHEDULES["linear"], torch.zeros(4, dtype=torch.long)
    z0 = torch.full((4, *SHAPE), 200, dtype=torch.uint8)
    with pytest.raises(
        TypeError, match=r"^`z0` must be floating, but has dtype torch\.uint8\. Wri"
    ):
        q_sample(schedule, z0, t, torch.randn(4, *SHAPE))
    with pytest.raises(
        TypeError, match=r"^`z0` must be floating, but has dtype torch\.uint8\. Wri"
    ):
        noise_prediction_loss(linear_model, schedule, z0, CONTEXT)
    for dtype in (torch.float32, torch.bool, torch.uint8):
        with pytest.raises(TypeError, match="^`t` must be int32 or int64, but has dtype torch"):
            q_sample(schedule, images(), t.to(dtype), images())


@pytest.mark.parametrize("wrong", [(1, 6, 6), (4, 1, 6, 1), (1,)])
def test_a_prediction_that_would_broadcast_is_refused(wrong: tuple[int, ...]) -> None:
    schedule, z0 = SCHEDULES["linear"], images()

    def broken(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return z.new_zeros(wrong)

    said = r"^`model` must return the shape of `z` = \({}, 1, 6, 6\), but returns \({}"
    one, two = said.format(4, wrong[0]), said.format(8, wrong[0])
    for weight in (None, 5.0):
        with pytest.raises(ValueError, match=one):
            noise_prediction_loss(broken, schedule, z0, CONTEXT, largest_weight=weight)
    with pytest.raises(ValueError, match=one):
        sample_ddim(broken, schedule, CONTEXT, shape=SHAPE)
    with pytest.raises(ValueError, match=two):
        sample_ddim(broken, schedule, CONTEXT, shape=SHAPE, guidance=2.0, null_context=CONTEXT)


def test_a_clipped_picture_and_its_noise_still_make_up_the_noisy_one() -> None:
    schedule, start = SCHEDULES["linear"], 3 * images()
    seen: list[Tensor] = []

    def silent(z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        seen.append(z)
        return 0 * z

    sample_ddim(silent, schedule, CONTEXT, steps=2, shape=SHAPE, noise=start, clip=0.5)
    # without noise the picture is start / signal: far outside the bound at the last timestep
    signal, noise = schedule.signal_and_noise(torch.full((4,), 199), start)
    picture = (start / signal).clamp(-0.5, 0.5)
    assert ((start / signal).abs() > 0.5).double().mean() > 0.5
    left = (start - signal * picture) / noise
    assert_close(seen[1], q_sample(schedule, picture, torch.full((4,), 99), left))


def test_shapes_that_do_not_fit_are_refused() -> None:
    schedule, z0 = SCHEDULES["linear"], images()
    with pytest.raises(ValueError, match=r"^`betas` must have shape \(T,\), but has \(1, 2\)\.$"):
        Schedule(torch.full((1, 2), 0.1))
    with pytest.raises(ValueError, match=r"^`noise` must have the shape of `z0` = \(4, 1, 6, 6\)"):
        q_sample(schedule, z0, torch.zeros(4, dtype=torch.long), z0[:1])
    with pytest.raises(ValueError, match=r"^`t` must have shape \(4,\), but has \(1,\)\.$"):
        q_sample(schedule, z0, torch.zeros(1, dtype=torch.long), z0)
    with pytest.raises(ValueError, match=r"^`noise` must have shape \(4, 1, 6, 6\), but has"):
        sample_ddim(linear_model, schedule, CONTEXT, shape=SHAPE, noise=z0[:2])
    with pytest.raises(ValueError, match=r"^`null_context` must have the shape of `context` ="):
        guided(linear_model, z0, torch.zeros(4), CONTEXT, 2.0, CONTEXT[:, :1])


def test_guidance_without_a_null_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^`null_context` must be given when `guidance` differs"):
        sample_ddim(linear_model, SCHEDULES["linear"], CONTEXT, guidance=2.0, shape=SHAPE)
