"""Laws of the DiT and of classifier-free guidance."""

from __future__ import annotations

import pytest
import torch
from conftest import dead_parameters, randn, randomise

from monobath import UserError
from monobath.generation.guidance import guided
from monobath.models.dit import SIZES, DiT, DiTConfig, positions
from monobath.sampling import euler


def tiny_config(**changes) -> DiTConfig:
    return DiTConfig(**({"size": "custom", "patch": 2, "width": 16, "depth": 2, "heads": 2, "classes": 3} | changes))


def tiny_dit(seed: int = 0, **changes) -> DiT:
    return randomise(DiT(tiny_config(**changes)), seed).eval()  # type: ignore[return-value]


def inputs(batch: int = 3, height: int = 4, width: int = 6):
    return randn(batch, 4, height, width), torch.linspace(0.1, 1, batch), torch.arange(batch) % 4


def test_adaln_zero_starts_as_the_velocity_zero():
    dit = DiT(tiny_config())
    assert not dit(*inputs()).any()
    tokens = randn(2, 6, 16)
    assert torch.equal(dit.blocks[0](tokens, randn(2, 16)), tokens)


def test_after_two_steps_every_parameter_has_moved():
    dit = DiT(tiny_config())
    before = {name: p.detach().clone() for name, p in dit.named_parameters()}
    optimizer = torch.optim.SGD(dit.parameters(), lr=1.0)
    x, t, labels = inputs(4)
    for _ in range(3):  # the output first, then what it gates, then the rest
        optimizer.zero_grad()
        (dit(x, t, labels) - x).square().mean().backward()
        optimizer.step()
    assert not [name for name, p in dit.named_parameters() if torch.equal(p, before[name])]


@pytest.mark.parametrize("patch", [1, 2])
def test_every_parameter_gets_a_gradient_and_moves_the_output(patch):
    dit = tiny_dit(patch=patch)
    x, t, labels = inputs(4)
    assert sorted(labels.tolist()) == [0, 1, 2, dit.null]
    assert not dead_parameters(dit, lambda: dit(x, t, labels))


@pytest.mark.parametrize(("height", "width"), [(4, 6), (2, 2), (8, 2), (6, 10)])
def test_any_grid(height, width):
    dit = tiny_dit()
    x, t, labels = inputs(2, height, width)
    assert dit(x, t, labels).shape == x.shape
    # A transposed picture is another picture: rows are not columns.
    assert not torch.allclose(dit(x.mT, t, labels).mT, dit(x, t, labels), atol=1e-3)


def test_positions_of_a_larger_grid_continue_a_smaller_one():
    small, large = positions(2, 3, 8), positions(5, 7, 8)
    assert torch.equal(large.unflatten(0, (5, 7))[:2, :3].flatten(0, 1), small)
    assert len(large.unique(dim=0)) == 35


def test_a_sample_depends_on_its_own_inputs_only():
    dit = tiny_dit()
    x, t, labels = inputs(4)
    together = dit(x, t, labels)
    for i in range(4):
        torch.testing.assert_close(dit(x[i : i + 1], t[i : i + 1], labels[i : i + 1])[0], together[i])
    assert not torch.allclose(dit(x, t, labels.flip(0)), together)
    assert not torch.allclose(dit(x, t.flip(0), labels), together)


def test_without_classes():
    dit = tiny_dit(classes=0)
    x, t, labels = inputs()
    assert dit(x, t).shape == x.shape
    with pytest.raises(ValueError, match=r"labels are \(3,\): this network has 0 classes"):
        dit(x, t, labels)
    with pytest.raises(ValueError, match=r"labels are None: this network has 3 classes"):
        tiny_dit()(x, t)


def test_checkpointing_changes_nothing():
    dit = tiny_dit().train()
    x, t, labels = inputs()
    found = []
    for dit.checkpointing in (False, True):
        dit.zero_grad()
        dit(x, t, labels).square().sum().backward()
        found.append([p.grad.clone() for p in dit.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_published_sizes(size, millions):
    """Table 1's parameters, which count a variance for each output; ours has none, and no biases of q, k, v."""
    with torch.device("meta"):
        dit = DiT(DiTConfig(size=f"{size}/2", classes=1000))
    assert sum(p.numel() for p in dit.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert (len(dit.blocks), dit.config.width, dit.config.heads) == SIZES[size]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "M/2"}, r"dit.size is 'M/2': give SIZE/PATCH with SIZE in S, B, L, XL"),
        ({"size": "S/3"}, "PATCH in 1, 2, 4, 8"),
        ({"depth": 0}, "dit.depth is 0"),
        ({"heads": 3}, "dit.width=16 must be divisible by dit.heads=3"),
        ({"classes": -1}, "dit.classes is -1"),
    ],
)
def test_shapes_that_cannot_be(changes, words):
    with pytest.raises(UserError, match=words):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("shape", "times", "words"),
    [((2, 3, 4, 4), 2, r"expected \(B, 4, h, w\)"), ((2, 4, 5, 4), 2, "divisible by 2"), ((2, 4, 4, 4), 1, "one time")],
)
def test_inputs_that_cannot_be(shape, times, words):
    with pytest.raises(ValueError, match=words):
        tiny_dit()(torch.zeros(shape), torch.zeros(times), torch.zeros(2, dtype=torch.long))


# ---- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_by_hand():
    dit = tiny_dit()
    x, t, labels = inputs()
    t = torch.full((3,), 0.5)
    plain, none = dit(x, t, labels), dit(x, t, torch.full_like(labels, dit.null))
    velocity = guided(dit, labels, dit.null, scale=3.0, interval=(0.4, 0.5))
    torch.testing.assert_close(velocity(x, t), none + 3 * (plain - none), rtol=1e-4, atol=1e-4)
    for time in (0.4, 0.51):  # outside of low < t ≤ high
        t = torch.full((3,), time)
        assert torch.equal(velocity(x, t), dit(x, t, labels))


@pytest.mark.parametrize("options", [{"scale": 1.0}, {"scale": 5.0, "interval": (0.5, 0.5)}])
def test_scale_one_and_an_empty_interval_are_the_plain_network(options):
    dit, (x, _, labels) = tiny_dit(), inputs()
    calls = []

    def network(*given):
        calls.append(len(given[0]))
        return dit(*given)

    found = euler(guided(network, labels, dit.null, **options), x, kind="v", steps=4, power=1.0)
    assert torch.equal(found, euler(lambda x_t, t: dit(x_t, t, labels), x, kind="v", steps=4, power=1.0))
    assert calls == [3] * 4  # and no pass is spent on the null class


def test_guidance_acts_in_its_interval_only():
    dit, (x, _, labels) = tiny_dit(), inputs()
    passes = []

    def network(x_t, t, numbers):
        passes.append((t[0].item(), len(x_t)))
        return dit(x_t, t, numbers)

    euler(guided(network, labels, dit.null, scale=2.0, interval=(0.25, 0.75)), x, kind="v", steps=4, power=1.0)
    assert passes == [(1.0, 3), (0.75, 6), (0.5, 6), (0.25, 3)]


def test_the_null_class_is_not_guided():
    dit, (x, t, _) = tiny_dit(), inputs()
    t, null = torch.full((3,), 0.5), torch.full((3,), dit.null)
    torch.testing.assert_close(guided(dit, null, dit.null, scale=7.0)(x, t), dit(x, t, null), rtol=1e-4, atol=1e-4)
