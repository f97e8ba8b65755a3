"""CLIP against transformers, against a slow twin, and by its own invariants."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import process_pair
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.errors import DalleError
from dalle_cli.models.clip import CLIP, CLIPConfig, caption_hash, sigmoid_loss, softmax_loss
from dalle_cli.training.distributed import gather_rows
from reference import clip as reference

SMALL = CLIPConfig(
    n_proj=12,
    image_size=16,
    patch_size=8,
    vision_width=24,
    vision_layers=2,
    vision_heads=3,
    n_text_vocab=40,
    n_text=9,
    text_width=16,
    text_layers=2,
    text_heads=2,
)


def make(seed: int = 0, **changes: object) -> CLIP:
    """A small CLIP whose gains and biases are not at their trivial initial values."""
    torch.manual_seed(seed)
    model = CLIP(dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3 if name.endswith("bias") else 0.1)
    return model


def batch(n: int = 5, seed: int = 1, size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, size, size, generator=generator)
    tokens = torch.randint(1, 39, (n, 9), generator=generator)
    lengths = torch.arange(n) % 9 + 1
    tokens[torch.arange(9) >= lengths[:, None]] = 0
    return images, tokens, lengths


def transformers_twin(config: CLIPConfig) -> Any:
    transformers = pytest.importorskip("transformers")

    def tower(name: str) -> dict[str, int]:
        width, layers, heads = (getattr(config, f"{name}_{size}") for size in ("width", "layers", "heads"))
        sizes = {"hidden_size": width, "intermediate_size": 4 * width}
        return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads}

    text = {
        **tower("text"),
        "vocab_size": config.n_text_vocab,
        "max_position_embeddings": config.n_text,
        "bos_token_id": config.n_text_vocab - 2,
        "eos_token_id": config.n_text_vocab - 1,
    }
    vision = {
        **tower("vision"),
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    torch.manual_seed(3)
    settings = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.n_proj)
    twin = transformers.CLIPModel(settings).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return twin


def check_against_transformers(config: CLIPConfig) -> None:
    twin = transformers_twin(config)
    ours = CLIP(config).eval()
    state = dict(twin.state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(config.n_text)[None]  # as older published files do
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    ours.load_state_dict(state)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in twin.state_dict().items()}

    images = torch.rand(2, 3, config.image_size, config.image_size)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    tokens = torch.randint(1, config.n_text_vocab - 2, (2, config.n_text))
    end = torch.tensor([3, config.n_text - 2])
    tokens[torch.arange(2), end] = config.n_text_vocab - 1  # the end token is the highest id
    with torch.no_grad():
        answer = twin(input_ids=tokens, pixel_values=(images - mean) / std)
        image, text = ours.encode_image(images), ours.encode_text(tokens, end + 1)
        unit = torch.nn.functional.normalize
        torch.testing.assert_close(unit(image), answer.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(unit(text), answer.text_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            image, twin.get_image_features((images - mean) / std).pooler_output, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(text, twin.get_text_features(tokens).pooler_output, rtol=0, atol=1e-5)
        logits = ours.scale() * ours.similarity(image, text)
        torch.testing.assert_close(logits, answer.logits_per_image, rtol=0, atol=1e-4)


def test_matches_transformers() -> None:
    check_against_transformers(SMALL)


@pytest.mark.slow
def test_matches_transformers_at_the_published_size() -> None:
    check_against_transformers(CLIPConfig())


def test_defaults_are_the_published_vit_b_32() -> None:
    with torch.device("meta"):
        model = CLIP(CLIPConfig())
    assert sum(p.numel() for p in model.parameters()) == 151_277_313


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_matches_the_slow_twin(loss: str) -> None:
    model = make(loss=loss).double().eval()
    images, tokens, lengths = batch()
    images = images.double()
    tokens[3], lengths[3] = tokens[2], lengths[2]  # the same caption twice
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    captions: list[object] = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    expected_images = np.stack([reference.encode_image(x.numpy(), weights, 2, 3) for x in images])
    expected_texts = np.stack([reference.encode_text(c, weights, 2, 2) for c in captions])  # type: ignore[arg-type]
    with torch.no_grad():
        np.testing.assert_allclose(model.encode_image(images).numpy(), expected_images, rtol=0, atol=1e-12)
        np.testing.assert_allclose(model.encode_text(tokens, lengths).numpy(), expected_texts, rtol=0, atol=1e-12)
        found, metrics = model.loss(images, tokens, lengths)
    scale = math.exp(weights["logit_scale"])
    if loss == "softmax":
        expected = reference.softmax_loss(expected_images, expected_texts, captions, scale)
    else:
        expected = reference.sigmoid_loss(
            expected_images, expected_texts, captions, scale, float(weights["logit_bias"])
        )
    assert found.item() == pytest.approx(expected, abs=1e-12)
    assert metrics["scale"].item() == pytest.approx(scale)
    cosines = [[reference.cosine(i, t) for t in expected_texts] for i in expected_images]
    hits = [captions[int(np.argmax(row))] == captions[i] for i, row in enumerate(cosines)]
    assert metrics["accuracy"].item() == pytest.approx(np.mean(hits))


def test_equal_captions_ignore_what_lies_beyond_the_end() -> None:
    tokens = torch.tensor([[1, 2, 0], [1, 2, 5], [1, 2, 0], [1, 0, 0], [2, 1, 0]])
    hashes = caption_hash(tokens, torch.tensor([2, 2, 3, 1, 2]))
    found = hashes[:, None] == hashes
    expected = torch.eye(5, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = True
    assert found.equal(expected)


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_equal_captions_are_not_negatives(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Logits which find both images of a caption are right, and pushed apart only if the two count as negatives."""
    pairs = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    logits = ((pairs.float() * 2 - 1) * 30).requires_grad_()
    right, wrong = (torch.autograd.grad(loss(logits, x), logits)[0][0, 1].item() for x in (pairs, torch.eye(3).bool()))
    assert right == pytest.approx(0, abs=1e-6)
    assert wrong > 0.1
    assert loss(logits, pairs) + 1 < loss(logits, pairs[[2, 0, 1]])


def whole_batch_loss(model: CLIP, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The loss by targets for each pair, (B, B), and by comparing captions token by token."""
    similarities = model.similarity(model.encode_image(images), model.encode_text(tokens, lengths))
    captions = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    pairs = torch.tensor([[one == other for other in captions] for one in captions])
    if model.config.loss == "sigmoid":
        logits = model.scale() * similarities + model.logit_bias
        return -F.logsigmoid((pairs.double() * 2 - 1) * logits).sum() / len(logits)
    logits, target = model.scale() * similarities, pairs.double()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def gradients(model: CLIP, loss: Tensor) -> list[Tensor]:
    return [g for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_and_its_gradients_are_those_of_the_whole_batch(loss: str) -> None:
    model = make(loss=loss).double()
    images, tokens, lengths = batch()
    tokens[3], lengths[3] = tokens[2], lengths[2]
    given = images.double(), tokens, lengths
    expected = whole_batch_loss(model, *given)
    wanted, found = gradients(model, expected), model.loss(*given)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(model, found), wanted, rtol=1e-9, atol=1e-13)


def parts(loss: str) -> dict[str, object]:
    """What two processes make of two halves of a batch, as the trainer does: means of losses and of gradients."""
    group = process_pair.group()
    model = make(loss=loss).double()
    images, tokens, lengths = (x.chunk(2)[group.rank] for x in repeated())
    found, figures = model.loss(images.double(), tokens, lengths, gather_rows)
    means = group.means({"loss": found.detach(), "accuracy": figures["accuracy"]})
    averaged = [sum(group.gathered(g), torch.zeros_like(g)) / 2 for g in gradients(model, found)]
    return {**means, "gradients": averaged}


def repeated() -> tuple[Tensor, Tensor, Tensor]:
    """A batch in which the two halves share a caption."""
    images, tokens, lengths = batch()
    n = len(images) // 2 * 2
    tokens[n - 1], lengths[n - 1] = tokens[0], lengths[0]
    return images[:n], tokens[:n], lengths[:n]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_two_processes_make_the_loss_and_gradients_of_one(pair: process_pair.Pair, loss: str) -> None:
    model = make(loss=loss).double()
    images, tokens, lengths = repeated()
    expected, figures = model.loss(images.double(), tokens, lengths)
    wanted = gradients(model, expected)
    for found in pair(parts, loss):
        torch.testing.assert_close(found["loss"], expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found["accuracy"], figures["accuracy"])
        torch.testing.assert_close(found["gradients"], wanted, rtol=1e-9, atol=1e-13)


def test_captions_of_other_words_or_order_have_other_hashes() -> None:
    tokens = torch.randint(0, 49408, (4000, 77), generator=torch.Generator().manual_seed(0))
    tokens[2000:] = tokens[:2000].flip(1)  # the same words in another order
    few = torch.cartesian_prod(*[torch.arange(4)] * 5)  # all captions of five of four words, and their beginnings
    for rows, lengths in ((tokens, torch.full((4000,), 77)), (few, torch.full((1024,), 5))):
        assert len(set(caption_hash(rows, lengths).tolist())) == len(rows)
    assert len({h for n in range(6) for h in caption_hash(few, torch.full((1024,), n)).tolist()}) == sum(
        4**n for n in range(6)
    )


def test_softmax_loss_of_no_knowledge_is_log_of_the_batch() -> None:
    assert softmax_loss(torch.zeros(8, 8), torch.eye(8).bool()).item() == pytest.approx(math.log(8))


def test_sigmoid_bias_exists_only_for_that_loss() -> None:
    softmax, sigmoid = CLIP(SMALL), CLIP(dataclasses.replace(SMALL, loss="sigmoid"))
    assert set(sigmoid.state_dict()) - set(softmax.state_dict()) == {"logit_bias"}
    assert sigmoid.logit_bias.item() == -10
    assert sigmoid.scale().item() == pytest.approx(10)
    assert softmax.scale().item() == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_gradient_reaches_every_parameter(loss: str) -> None:
    model = make(loss=loss)
    model.loss(*batch())[0].backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("k_proj.bias"):  # softmax over keys does not see what is added to all of them
            assert parameter.grad.abs().max() > 1e-7, name


def test_text_sees_what_comes_before_its_last_token_and_nothing_after() -> None:
    model = make().eval()
    _, tokens, _ = batch()
    lengths = torch.full((5,), 6)
    with torch.no_grad():
        before = model.encode_text(tokens, lengths)
        beyond, within = tokens.clone(), tokens.clone()
        beyond[:, 6:] = 17
        within[:, 0] = (within[:, 0] + 1) % 40
        torch.testing.assert_close(model.encode_text(beyond, lengths), before, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.encode_text(tokens[:, :6], lengths), before, rtol=0, atol=1e-6)
        assert (model.encode_text(within, lengths) - before).abs().amax(1).min() > 1e-4
        assert (model.encode_text(tokens, lengths - 1) - before).abs().amax(1).min() > 1e-4
        states, changed = model.text_states(tokens), model.text_states(beyond)
        torch.testing.assert_close(states[:, :6], changed[:, :6], rtol=0, atol=1e-6)
        assert (states[:, 6:] - changed[:, 6:]).abs().max() > 1e-3


def test_an_empty_caption_is_read_at_position_0() -> None:
    model = make().eval()
    tokens = torch.zeros(1, 9, dtype=torch.long)
    with torch.no_grad():
        empty, one = (model.encode_text(tokens, torch.tensor([n])) for n in (0, 1))
    assert empty.equal(one)


def test_a_row_does_not_depend_on_its_batch() -> None:
    model = make().eval()
    images, tokens, lengths = batch()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images)[2:3], model.encode_image(images[2:3]))
        torch.testing.assert_close(
            model.encode_text(tokens, lengths)[2:3], model.encode_text(tokens[2:3], lengths[2:3])
        )


def test_a_matching_batch_costs_less_than_a_shuffled_one() -> None:
    model, (images, tokens, lengths) = overfit("softmax", updates=30)
    order = torch.roll(torch.arange(len(images)), 1)
    with torch.no_grad():
        matching = model.loss(images, tokens, lengths)[0]
        assert matching + 1 < model.loss(images, tokens[order], lengths[order])[0]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_overfits_16_random_pairs(loss: str) -> None:
    model, pairs = overfit(loss, updates=60)
    with torch.no_grad():
        assert model.loss(*pairs)[1]["accuracy"] == 1


def overfit(loss: str, updates: int) -> tuple[CLIP, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(SMALL, loss=loss))
    images, tokens, lengths = batch(16)
    tokens = torch.randint(1, 39, (16, 9), generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(updates):
        optimizer.zero_grad()
        model.loss(images, tokens, lengths.fill_(9))[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval(), (images, tokens, lengths)


def test_scale_is_clipped_at_100_and_comes_back() -> None:
    model = make()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    assert model.scale().item() == pytest.approx(100)
    images, tokens, lengths = batch()
    model.eval().loss(images, tokens, lengths)
    assert model.logit_scale.item() == 9  # evaluation changes nothing
    loss, metrics = model.train().loss(images, tokens, lengths)
    loss.backward()  # type: ignore[no-untyped-call]
    assert metrics["scale"].item() == pytest.approx(100)
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    assert model.logit_scale.grad is not None
    assert model.logit_scale.grad.abs() > 0


def test_other_sizes_are_resized_with_antialiasing() -> None:
    model = make().eval()
    images = batch(2, size=48)[0]
    small = torch.nn.functional.interpolate(images, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), model.encode_image(small))
        flat = torch.full((1, 3, 5, 5), 0.5)
        torch.testing.assert_close(model.encode_image(flat), model.encode_image(torch.full((1, 3, 16, 16), 0.5)))


def test_pixels_are_normalised_by_the_published_mean() -> None:
    model = make().eval()
    mean = torch.tensor(SMALL.pixel_mean).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    with torch.no_grad():
        zero = model.vision_model(torch.zeros(1, 3, 16, 16))
        torch.testing.assert_close(model.encode_image(mean), model.visual_projection(zero))


def test_bfloat16_autocast_keeps_embeddings_and_loss_in_float32() -> None:
    model = make()
    images, tokens, lengths = batch()
    exact = model.encode_image(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, text = model.encode_image(images), model.encode_text(tokens, lengths)
        loss, _ = model.loss(images, tokens, lengths)
    assert found.dtype == text.dtype == loss.dtype == torch.float32
    assert not found.equal(exact)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)
    loss.backward()  # type: ignore[no-untyped-call]


def test_weights_in_bfloat16_give_float32_embeddings() -> None:
    model = make().bfloat16()
    images, tokens, lengths = batch()
    assert model.encode_image(images).dtype == model.encode_text(tokens, lengths).dtype == torch.float32
    assert model.loss(images, tokens, lengths)[0].dtype == torch.float32


def test_initial_spread_does_not_grow_with_width() -> None:
    torch.manual_seed(0)
    wide = CLIP(dataclasses.replace(SMALL, vision_width=192, text_width=128))
    for model in (make(), wide):
        images, tokens, lengths = batch()
        assert 0.3 < model.encode_image(images).std() < 3
        assert 0.3 < model.encode_text(tokens, lengths).std() < 3
    weights = wide.state_dict()
    attention = "vision_model.encoder.layers.0.self_attn"
    assert weights[f"{attention}.q_proj.weight"].std().item() == pytest.approx(192**-0.5, rel=0.05)
    assert weights[f"{attention}.out_proj.weight"].std().item() == pytest.approx(192**-0.5 / 2, rel=0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 20}, "image_size"),
        ({"vision_heads": 5}, "vision_heads"),
        ({"text_heads": 5}, "text_heads"),
        ({"activation": "relu"}, "activation"),
        ({"loss": "triplet"}, "loss"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(DalleError, match=f"expected clip.*{words}.*found"):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]


def test_pictures_and_captions_that_do_not_fit_are_refused() -> None:
    model = make()
    with pytest.raises(DalleError, match="square images, found 8 x 16"):
        model.encode_image(torch.zeros(1, 3, 16, 8))
    with pytest.raises(DalleError, match="at most 9 tokens, found 10"):
        model.encode_text(torch.zeros(1, 10, dtype=torch.long), torch.ones(1))


def test_config_takes_lists_as_json_gives_them() -> None:
    assert CLIPConfig(pixel_mean=[0.5, 0.5, 0.5]).pixel_mean == (0.5, 0.5, 0.5)  # type: ignore[arg-type]


def test_a_text_encoder_alone() -> None:
    model = make(vision_layers=0).eval()
    whole = make().eval()
    names = {name for name in whole.state_dict() if name.startswith("text_")}
    assert set(model.state_dict()) == names
    model.load_state_dict({name: whole.state_dict()[name] for name in names})
    images, tokens, lengths = batch()
    with torch.no_grad():
        assert model.encode_text(tokens, lengths).equal(whole.encode_text(tokens, lengths))
        states = model.text_states(tokens)
        assert model.pool_text(states, lengths).equal(whole.encode_text(tokens, lengths))
    with pytest.raises(DalleError, match="found a text encoder alone"):
        model.encode_image(images)


def test_vision_layers_may_be_wider_inside() -> None:
    assert make(vision_hidden=96).state_dict().keys() == make().state_dict().keys()  # 4 x 24
    wide = make(vision_hidden=40)
    assert wide.vision_model.encoder.layers[0].mlp.fc1.weight.shape == (40, 24)  # type: ignore[union-attr]
    assert wide.text_model.encoder.layers[0].mlp.fc1.weight.shape == (64, 16)  # type: ignore[union-attr]
    with pytest.raises(DalleError, match=r"clip.vision_hidden of at least 0, found -1"):
        dataclasses.replace(SMALL, vision_hidden=-1)
