"""Laws of the sampler's times, seeds and noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monobath.sampling import draw_noise, euler, seeds_for, time_grid


def test_time_grid():
    assert time_grid(1).tolist() == [1, 0]
    assert time_grid(4, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid(4, 2.0).tolist() == [1, 0.5625, 0.25, 0.0625, 0]
    for power in (0.5, 1.0, 2.0, 4.0):
        grid = time_grid(12, power)
        assert grid.dtype == torch.float64
        assert len(grid) == 13
        assert (grid[1:] < grid[:-1]).all()


@pytest.mark.parametrize(("steps", "power", "named"), [(0, 2.0, "steps=0"), (-3, 2.0, "steps=-3"), (2, 0.0, "power=0")])
def test_time_grid_says_no(steps, power, named):
    with pytest.raises(ValueError, match=named):
        time_grid(steps, power)


def test_seeds():
    assert seeds_for(5, 3) == [5, 6, 7]
    assert seeds_for([9, 2], 2) == [9, 2]
    assert seeds_for(torch.tensor([9, 2]), 2) == [9, 2]
    with pytest.raises(ValueError, match="2 entries for a batch of 3"):
        seeds_for([1, 2], 3)


def test_noise_belongs_to_its_seed():
    together = draw_noise((3, 5, 7), [4, 8, 4])
    assert together.shape == (3, 3, 5, 7)
    assert together.dtype == torch.float32
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert torch.equal(together[1:2], draw_noise((3, 5, 7), [8]))
    many = draw_noise((3, 50, 50), range(8))
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
    assert abs((many[0] * many[1]).mean()) < 0.05  # neighbouring seeds are independent


def test_noise_does_not_touch_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    draw_noise((3, 4, 4), [0])
    assert torch.equal(torch.rand(2), expected)


def test_zero_noise():
    noise = draw_noise((3, 2, 4), [1, 2], "zero")
    assert noise.shape == (2, 3, 2, 4)
    assert not noise.any()
    with pytest.raises(ValueError, match="pink"):
        draw_noise((3, 2, 4), [1], "pink")  # type: ignore[arg-type]


def test_one_step_by_hand():
    noise = draw_noise((3, 2, 4), [1, 2])

    def predict(x_t, t):
        assert t.tolist() == [1, 1]
        return 0.3 * x_t

    assert torch.allclose(euler(predict, noise, kind="v"), 1.3 * noise)
    assert torch.allclose(euler(predict, noise, kind="x"), 0.3 * noise)


@pytest.mark.parametrize("seed", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_any_kind_of_integer_is_a_seed(seed):
    assert seeds_for(seed, 2) == [3, 4]
