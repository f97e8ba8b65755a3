"""The benchmark of the models over embeddings: both sides learn, of the same inputs, at equal sizes."""

import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from bench import cases, unclip
from bench.prior import N_BATCHES, trainer_of

SIZES, PICTURE = cases.QUICK_EMBEDDING_SIZES, cases.QUICK_UNET_SIZES


@pytest.fixture(scope="module")
def peer():
    if find_spec("dalle2_pytorch") is None:
        pytest.skip("what is compared with")
    from bench.peers import dalle2_pytorch

    return dalle2_pytorch


def falls(update, *given, n=40):
    """Of so many updates on the same inputs the first loss; the last are less than that by a fifth."""
    found = torch.stack([update(*given).float() for _ in range(n)])
    assert found.isfinite().all()
    assert found[-5:].mean() < 0.8 * found[0]
    return found[0]


@pytest.mark.parametrize(("made", "sizes"), [(unclip.prior, SIZES), (unclip.unet, PICTURE)], ids=["prior", "unet"])
def test_our_updates_are_those_of_training(monkeypatch, made, sizes):
    trainers = []
    monkeypatch.setattr(unclip, "trainer_of", lambda *a: trainers.append(trainer_of(*a)) or trainers[0])
    subject = made(sizes, 4)
    before = {name: p.clone() for name, p in trainers[0].model.named_parameters()}
    told = [subject.update() for _ in range(2 * N_BATCHES)]
    assert all(figures["loss"].isfinite() and 0.1 < figures["loss"] < 3 for figures in told)
    moved = [name for name, p in trainers[0].model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before)
    averaged = dict(trainers[0].ema.model.named_parameters())
    assert all(not torch.equal(averaged[name], before[name]) for name in moved)
    assert (trainers[0].machine.dtype, subject.parameters) == (torch.bfloat16, sum(p.numel() for p in before.values()))


def test_our_prior_is_trained_as_by_train_prior():
    task, batches = unclip.prior_task(SIZES, 8)
    tokens, _, z_t, z_i, t, noise = batches[0]
    assert tokens.shape == (8, SIZES["n_text"])
    assert set(torch.cat([batch[1] for batch in batches]).tolist()) <= {0, SIZES["n_text"]}
    for z in (z_t, z_i):
        torch.testing.assert_close(z.norm(dim=1), torch.ones(8))
    assert noise.shape == z_i.shape
    assert (t < task.model.config.n_timestep).all()
    told = trainer_of(task, task.options).update(batches[0])
    assert told.keys() == {"loss", "grad_norm", "lr"}
    assert task.options.caption_dropout == 0.1


def test_as_many_embeddings_as_asked_for():
    found = unclip.embeddings(SIZES, 6, 3, "float32").update()
    assert found.shape == (6, SIZES["n_embedding"])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(6))
    again = unclip.embeddings(SIZES, 6, 3, "float32", one_caption=True).update()
    torch.testing.assert_close(again[0], found[0])  # of the same caption
    assert (again[1:] - found[1:]).abs().max(1).values.min() > 1e-5
    assert len({row.numpy().tobytes() for row in torch.cat([found, again[1:]])}) == 11


def test_the_pictures_are_those_of_the_case():
    images, z_i = unclip.painted(PICTURE, 4)[0]
    assert (images.shape, images.dtype, z_i.shape) == ((4, 3, 16, 16), torch.uint8, (4, 64))
    other, _ = unclip.painted(PICTURE, 4)[1]
    assert not torch.equal(images, other)


# Beside the peer, where it is installed


def test_nothing_stands_in_for_packages_any_longer(peer):
    assert not [name for name, module in sys.modules.items() if isinstance(module, peer.Empty)]


@pytest.mark.parametrize("dtype", cases.ARITHMETICS)
def test_the_peers_updates_lower_the_loss(peer, dtype):
    torch.manual_seed(0)
    tokens, _, z_t, z_i, *_ = unclip.prior_task(SIZES, 8)[1][0]
    model = peer.Prior(SIZES)
    update = peer.trainer(model, dtype, {**peer.PRIOR_TRAIN, "lr": 3e-3}, model)
    assert 0.5 < falls(update, tokens, z_t, z_i) < 5
    painter = peer.decoder(PICTURE, 16)
    update = peer.trainer(painter, dtype, {**peer.DECODER_TRAIN, "lr": 3e-3}, partial(peer.painting, painter))
    assert 0.5 < falls(update, *unclip.painted(PICTURE, 4)[0]) < 5


def test_the_peers_prior_is_told_what_ours_is(peer):
    torch.manual_seed(0)
    model = peer.Prior(SIZES)
    tokens, _, z_t, z_i, *_ = unclip.prior_task(SIZES, 8)[1][0]

    def loss(tokens, z_t, z_i):
        torch.manual_seed(1)
        return model(tokens, z_t, z_i)

    plain = loss(tokens, z_t, z_i)
    torch.testing.assert_close(loss(tokens, z_t, z_i), plain)  # it has not scaled what it was given
    for changed in ((tokens.flip(0), z_t, z_i), (tokens, z_t.flip(0), z_i), (tokens, z_t, z_i.flip(0))):
        assert (loss(*changed) - plain).abs() > 1e-6
    plain.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert model.tokens.weight.grad[tokens].abs().sum() > 0


def test_the_peers_decoder_is_told_of_the_embedding(peer):
    torch.manual_seed(0)
    model = peer.decoder(PICTURE, 16)
    for p in model.unets[0].to_out.parameters():  # which training starts from zero
        p.data.normal_()
    images, z_i = unclip.painted(PICTURE, 4)[0]

    def loss(z):
        torch.manual_seed(1)
        return model(images.float() / 255, image_embed=z)

    assert (loss(z_i) - loss(z_i.flip(0))).abs() > 1e-6
    loss(z_i).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None]
    assert all("null_text" in name or "norm_mid" in name for name in silent), silent


def test_the_peer_calls_its_network_as_often_as_ours(peer):
    subject = peer.embeddings(SIZES, 6, 5, "float32")
    calls = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(1) if isinstance(module, peer.PACKAGE.CausalTransformer) else None
    )
    found = subject.update()
    handle.remove()
    assert len(calls) == 5
    assert found.shape == (6, SIZES["n_embedding"])
    assert found.isfinite().all()
    assert len({row.numpy().tobytes() for row in found}) == 6


def test_the_sizes_are_equal(peer):
    from bench.peers import count
    from dalle_cli.models.decoder import Decoder, DecoderConfig
    from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig

    with torch.device("meta"):
        ours = count(DiffusionPrior(DiffusionPriorConfig(**cases.EMBEDDING_SIZES)))
        theirs = count(peer.Prior(cases.EMBEDDING_SIZES))
        assert abs(ours / theirs - 1) < 0.03, (ours, theirs)
        ours = count(Decoder(DecoderConfig(**cases.UNET_SIZES, n_text=0)))
        theirs = count(peer.decoder(cases.UNET_SIZES, cases.PEER_WIDTH))
        assert abs(ours / theirs - 1) < 0.03, (ours, theirs)
