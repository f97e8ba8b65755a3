"""ruDALL-E's Malevich and minDALL-E: the publishers' own models in their files, imported by the command."""

from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import published_priors as published
import pytest
import torch
from conftest import run_bad, run_ok
from tensor_lists import check_covers, n_parameters, published_shapes

from dalle_cli.artifacts import open_artifact
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.importing import mindalle, rudalle
from dalle_cli.models.prior import Prior, PriorConfig
from dalle_cli.pipelines import loading
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.sampling.categorical import CategoricalOptions

CPU = torch.device("cpu")


class Imported(NamedTuple):
    """A publisher's transformer and VQGAN, the bundle made of their files, and the prior as it is loaded from there."""

    model: torch.nn.Module
    vqgan: torch.nn.Module
    bundle: object
    prior: Prior

    @property
    def malevich(self):
        return self.prior.config.start

    def logits(self, tokens, codes):
        logits = published.malevich_logits if self.malevich else published.mindalle_logits
        return logits(self.model, tokens, codes)

    def theirs(self, tokens, lengths):
        """The publisher's tokens of captions in our form: BOS before, pads behind."""
        rows = torch.arange(tokens.shape[1]) < lengths[:, None]
        if self.malevich:
            return torch.cat([torch.full((len(tokens), 1), rudalle.BOS), tokens.where(rows, 0)], dim=1)
        pad = tokenizers.load(self.bundle / "tokenizer.json").encode_batch([""], 1)[0].item()
        return tokens.where(rows, pad)


@pytest.fixture(scope="module", params=["malevich", "mindalle"])
def imported(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    publish = published.publish_malevich if request.param == "malevich" else published.publish_mindalle
    model, vqgan = publish(root / "files")
    with mock.patch.object(mindalle, "IMPORTER", replace(mindalle.IMPORTER, clip="")):  # which is imported elsewhere
        run_ok("import", root / "files", "-o", root / "bundle")
    prior = loading.prior(open_artifact(root / "bundle" / "prior.safetensors"), CPU)
    return Imported(model, vqgan, root / "bundle", prior)


def captions(imported):
    """Three captions: one in the middle, an empty one, and one of full length."""
    config = imported.prior.config
    tokens = torch.randint(4, 40, (3, config.n_text), generator=torch.Generator().manual_seed(0))
    return tokens, torch.tensor([5, 0, config.n_text])


def test_logits_are_the_publishers(imported):
    tokens, lengths = captions(imported)
    codes = torch.randint(published.N_CODES, (3, 8, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        text, image = imported.prior(tokens, lengths, codes)
        expected = imported.logits(imported.theirs(tokens, lengths), codes.flatten(1)[:, :-1])
    torch.testing.assert_close(text, expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(image, expected[1], rtol=0, atol=1e-4)
    assert image.std() > 0.5


def test_greedy_codes_are_the_publishers(imported):
    """Sampled with a cache by ours, by a forward pass over everything for each code by theirs."""
    tokens, lengths = captions(imported)
    logits = published.malevich_logits if imported.malevich else published.mindalle_logits
    expected = published.greedy(logits, imported.model, imported.theirs(tokens, lengths))
    codes = sample_codes(imported.prior, tokens, lengths, range(3), 0, CategoricalOptions(temperature=0))
    assert torch.equal(codes.flatten(1), expected)
    assert len(expected.unique()) > 8


def test_codes_and_pixels_are_the_publishers(imported):
    dvae = loading.dvae(open_artifact(imported.bundle / "dvae.safetensors"), CPU)
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = imported.vqgan.quant_conv(imported.vqgan.encoder(2 * images - 1))
        if imported.malevich:
            codes = imported.vqgan.quantize.proj(features).argmax(1)
            z = imported.vqgan.quantize.embed(codes)
        else:
            codes = imported.vqgan.get_codes(2 * images - 1).view(1, 8, 8)
            z = imported.vqgan.quantize.embedding(codes)
        pixels = imported.vqgan.decoder(imported.vqgan.post_quant_conv(z.permute(0, 3, 1, 2)))
    assert torch.equal(dvae.encode(images), codes)
    torch.testing.assert_close(dvae.decode(codes), (pixels.clamp(-1, 1) + 1) / 2, rtol=0, atol=1e-4)
    assert len(codes.unique()) > 3


def test_headers_and_license(imported):
    prior = open_artifact(imported.bundle / "prior.safetensors")
    more = {"top_k": 2048, "top_p": 0.995} if imported.malevich else {"top_k": 256}
    assert prior.config["sampling"] == {"temperature": 1.0, **more}
    assert prior.config["encoder"] == open_artifact(imported.bundle / "dvae.safetensors").digest
    assert prior.config["tokenizer"] == tokenizers.load(imported.bundle / "tokenizer.json").digest
    card = (imported.bundle / "README.md").read_text()
    assert ("no license" if imported.malevich else "may not be used commercially") in card


def test_whole_file_of_malevich_at_full_size():
    shapes = published_shapes("rudalle_malevich")
    config = rudalle.prior_config(shapes)
    assert config == PriorConfig(
        n_layer=24, n_head=16, n_embd=2048, n_text_vocab=16384, n_text=127, n_image_vocab=8192, grid=32,
        attention="window", activation="gelu_tanh", sandwich_norm=True, final_norms=2,
    )  # fmt: skip
    used = {name: shape for name, shape in shapes.items() if not name.endswith("_mask")}
    with torch.device("meta"):
        model = Prior(config)
        check_covers(model, rudalle.prior_tensors(used), used)
    assert [pattern.kind for pattern in model.patterns][-3:] == ["column", "row", "window"]
    masks, width = 3 * 1152**2, 2048
    dropped = 128 * (width + 1) + 2 * width  # logits of pads, a pad and a text position
    assert n_parameters(shapes) - masks - dropped + width == sum(p.numel() for p in model.parameters())  # BOS twice


def test_whole_file_of_mindalle_at_full_size():
    shapes = published_shapes("mindalle_stage2")
    config = mindalle.prior_config(shapes)
    assert config == PriorConfig(
        n_layer=42, n_head=24, n_embd=1536, n_text_vocab=16384, n_text=64, n_image_vocab=16384, grid=16,
        attention="full", start=False, flat_position=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Prior(config)
        check_covers(model, mindalle.prior_tensors(shapes, 1), shapes)
    assert n_parameters(shapes) == 1_291_081_728
    assert sum(p.numel() for p in model.parameters()) == 1_291_081_728 + 64 * 1536 + 2 * 16384


def test_other_versions_of_rudalle_are_refused(tmp_path):
    """Their tensors have the same names and shapes; the mask of the last layer tells them apart."""
    published.publish_malevich(tmp_path / "files")
    older = published.malevich(hf_version="v2").state_dict()
    torch.save(older, tmp_path / "files" / "pytorch_model_v3.bin")
    message = run_bad("import", tmp_path / "files", "-o", tmp_path / "out")
    assert "expected ruDALL-E weights of version 3" in message
    assert not (tmp_path / "out").exists()


def test_settings_of_mindalle():
    assert mindalle.n_heads(b"stage2:\n  hparams:\n    n_heads: 24\n") == 24
    assert mindalle.n_heads(b"dataset:\n  context_length: 64\n") is None
    assert mindalle.n_heads(b"") is None
    sizes = (b"5", b"{hparams: {n_heads: many}}", b"{hparams: {gelu_use_approx: true}}")
    for text in (b"\0", b"- 1", *(b"stage2: " + size for size in sizes)):
        with pytest.raises(mindalle.DalleError, match=r"in config\.yaml"):
            mindalle.n_heads(text)


def test_a_bundle_without_a_part_is_refused(tmp_path):
    published.publish_malevich(tmp_path / "files")
    (tmp_path / "files" / "bpe.model").unlink()
    assert "expected bpe.model in" in run_bad("import", tmp_path / "files", "-o", tmp_path / "out")
