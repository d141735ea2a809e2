"""Laws of the flow: one path, two kinds of prediction, conversions that undo each other."""

from __future__ import annotations

import pytest
import torch
from conftest import rand_images, randn

from monobath.flow import (
    MIN_TIME,
    clean_from_velocity,
    euler_step,
    flow_loss,
    interpolate,
    sample_times,
    to_clean,
    velocity,
    velocity_from_clean,
)
from monobath.sampling import euler


def case(t=(0.1, 0.5, 1.0)):
    t = torch.tensor(t)
    x, noise = rand_images(len(t), 3, 4, 6), randn(len(t), 3, 4, 6, seed=1)
    return x, noise, t, interpolate(x, noise, t)


def test_ends_of_the_path():
    x, noise, _, _ = case()
    assert torch.equal(interpolate(x, noise, torch.zeros(3)), x)
    assert torch.equal(interpolate(x, noise, torch.ones(3)), noise)


def test_conversions_undo_each_other():
    x, noise, t, x_t = case()
    v = velocity(x, noise)
    assert torch.allclose(clean_from_velocity(x_t, v, t), x, atol=1e-6)
    assert torch.allclose(velocity_from_clean(x_t, x, t), v, atol=1e-5)
    assert torch.allclose(x_t - (1 - t[:, None, None, None]) * v, noise, atol=1e-6)
    guess = randn(3, 3, 4, 6, seed=2)
    assert torch.allclose(to_clean(velocity_from_clean(x_t, guess, t), x_t, t, "v"), guess, atol=1e-5)
    assert torch.allclose(velocity_from_clean(x_t, to_clean(guess, x_t, t, "v"), t), guess, atol=1e-5)
    assert to_clean(guess, x_t, t, "x") is guess


def test_both_kinds_take_the_same_step():
    _, _, t, x_t = case()
    clean = randn(3, 3, 4, 6, seed=3)
    v = velocity_from_clean(x_t, clean, t)
    for fraction in (0.0, 0.3, 0.9):
        a = euler_step(v, x_t, t, fraction * t, "v")
        assert torch.allclose(a, euler_step(clean, x_t, t, fraction * t, "x"), atol=1e-5)
    assert torch.allclose(a, x_t + 0.1 * t[:, None, None, None] * v, atol=1e-6)


@pytest.mark.parametrize("kind", ["v", "x"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_the_true_field_leads_to_the_image(kind, steps, power):
    x, noise, _, _ = case()
    truth = x if kind == "x" else velocity(x, noise)
    seen = []

    def predict(x_t, t):
        assert t.shape == (3,)
        assert torch.allclose(x_t, interpolate(x, noise, t), atol=1e-5)
        return truth

    out = euler(predict, noise, kind=kind, steps=steps, power=power, callback=lambda i, _: seen.append(i))
    assert torch.allclose(out, x, atol=1e-5)
    assert seen == list(range(1, steps + 1))


def test_times_are_logit_normal():
    t = sample_times(100_000, generator=torch.Generator().manual_seed(0))
    assert t.min() > 0
    assert t.max() < 1
    logits = torch.logit(t.double())
    assert abs(logits.mean()) < 0.02
    assert abs(logits.std() - 1) < 0.02
    quantiles = torch.distributions.Normal(0, 1).icdf(torch.tensor([0.1, 0.25, 0.75, 0.9]).double())
    assert torch.allclose(torch.quantile(logits, torch.tensor([0.1, 0.25, 0.75, 0.9]).double()), quantiles, atol=0.03)


def test_times_can_lean_towards_the_image():
    plain, moved = (
        sample_times(20_000, generator=torch.Generator().manual_seed(3), mean=mean, std=std)
        for mean, std in ((0.0, 1.0), (-1.0, 1.2))
    )
    assert torch.allclose(torch.logit(moved), -1 + 1.2 * torch.logit(plain), atol=1e-3)
    assert moved.median() < plain.median()


@pytest.mark.parametrize(("batch", "ones"), [(16, 0.5), (16, 0.0), (16, 1.0), (12, 0.25), (10, 0.33), (1, 0.5)])
def test_fraction_of_ones_is_exact(batch, ones):
    total = 0
    for seed in range(200):
        t = sample_times(batch, generator=torch.Generator().manual_seed(seed), ones=ones)
        count = int((t == 1).sum())
        assert count - batch * ones < 1
        assert batch * ones - count < 1
        total += count
    assert abs(total / 200 - batch * ones) < 0.15  # rounded up and down in the right proportion


def test_times_follow_the_generator():
    draws = [sample_times(8, generator=torch.Generator().manual_seed(s), ones=0.5) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with pytest.raises(ValueError, match=r"ones=1\.5"):
        sample_times(8, ones=1.5)


@pytest.mark.parametrize("kind", ["v", "x"])
@pytest.mark.parametrize("space", ["v", "x"])
def test_loss_is_zero_at_the_truth_only(kind, space):
    x, noise, t, x_t = case((0.001, 0.3, 1.0))
    truth = x if kind == "x" else velocity(x, noise)
    loss = flow_loss(truth, x, noise, x_t, t, kind, space)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss < 1e-10
    assert flow_loss(truth + 0.1, x, noise, x_t, t, kind, space) > 1e-4
    assert flow_loss(truth.bfloat16(), x, noise, x_t, t, kind, space).dtype == torch.float32


def test_loss_values():
    x, noise, t, x_t = case((0.01, 0.2, 1.0))
    off = torch.full_like(x, 0.5)
    squares = {
        ("v", "v"): torch.tensor([1.0, 1.0, 1.0]),
        ("x", "x"): torch.tensor([1.0, 1.0, 1.0]),
        ("v", "x"): t**2,
        ("x", "v"): 1 / t.clamp_min(MIN_TIME) ** 2,  # t = 0.01 counts as 0.05
    }
    for (kind, space), weights in squares.items():
        truth = x if kind == "x" else velocity(x, noise)
        loss = flow_loss(truth + off, x, noise, x_t, t, kind, space)
        assert torch.allclose(loss, 0.25 * weights.mean(), rtol=1e-4)
        assert torch.allclose(
            flow_loss(truth + off, x, noise, x_t, t, kind, space, 1.5),
            0.25 * (weights * t.clamp_min(MIN_TIME) ** -1.5).mean(),
            rtol=1e-4,
        )


@pytest.mark.parametrize("kind", ["v", "x"])
@pytest.mark.parametrize("space", ["v", "x"])
@pytest.mark.parametrize("t", [0.0, 1e-8, 1e-4])
def test_gradients_are_finite_at_tiny_times(kind, space, t):
    x, noise, times, x_t = case((t, t))
    guess = randn(2, 3, 4, 6, seed=5).requires_grad_()
    loss = flow_loss(guess, x, noise, x_t, times, kind, space)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(guess.grad).all()
