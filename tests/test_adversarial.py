"""Laws of the adversarial loss."""

import pytest
import torch
from conftest import dead_parameters, rand_images, randn
from torch import nn

from monobath.losses.adversarial import (
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)


def test_scores_are_of_patches_and_of_one_picture_each():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(base=8).double()
    images = rand_images(3, 64, 96).double()[None].repeat(2, 1, 1, 1)
    images[1] = rand_images(3, 64, 96, seed=1).double()
    scores = discriminator(images)
    assert scores.shape == (2, 1, 6, 10)
    torch.testing.assert_close(discriminator(images[1:]), scores[1:])  # whatever else is in the batch


def test_every_parameter_of_the_discriminator_takes_part():
    torch.manual_seed(0)
    discriminator, images = PatchDiscriminator(base=8, layers=2), rand_images(2, 3, 32, 48)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(5)
    assert dead_parameters(discriminator, lambda: discriminator(images)) == []


def test_hinge_losses_by_hand_and_where_they_vanish():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert hinge_discriminator_loss(torch.tensor([1.0, 4.0]), torch.tensor([-1.0, -2.0])).item() == 0
    assert hinge_generator_loss(fake).item() == pytest.approx(1.5)


def test_adaptive_weight_equals_the_gradients_at_the_last_layer():
    torch.manual_seed(0)
    last = nn.Conv2d(4, 3, 3, padding=1)
    images = last(randn(2, 4, 8, 12))
    reconstruction, adversarial = images.abs().mean(), (3 * images).square().mean()
    weight = adaptive_weight(reconstruction, adversarial, last.weight)
    assert not weight.requires_grad
    (reconstruction + weight * adversarial).backward(retain_graph=True)
    parts = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    assert (weight * parts[1].norm()).item() == pytest.approx(parts[0].norm().item(), rel=1e-3)
    torch.testing.assert_close(last.weight.grad, parts[0] + weight * parts[1])


def test_adaptive_weight_is_bounded_where_the_discriminator_is_flat():
    weight = nn.Parameter(torch.ones(3))
    flat = 0 * weight.sum()
    assert adaptive_weight(1e6 * weight.sum(), flat, weight).item() == 1e4
    assert adaptive_weight(flat, weight.sum(), weight).item() == 0


def test_a_discriminator_learns_to_tell_noise_from_flat_pictures():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(base=8, layers=2)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3)
    real, fake = rand_images(4, 3, 32, 32), torch.zeros(4, 3, 32, 32)
    first = hinge_discriminator_loss(discriminator(real), discriminator(fake)).item()
    for _ in range(30):
        loss = hinge_discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 < first
