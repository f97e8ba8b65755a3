"""What sampling takes, against torch's own counter on models that are really loaded."""

import json
from pathlib import Path

import pytest
import torch
from conftest import run_bad, run_ok
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import dalle_cli
from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import save_tensors
from dalle_cli.config import build
from dalle_cli.devices import arithmetic
from dalle_cli.hub import bundles
from dalle_cli.models.decoder import Decoder, DecoderConfig
from dalle_cli.models.upsampler import Upsampler, UpsamplerConfig
from dalle_cli.pipelines import loading
from dalle_cli.planning.sampling import plan_sampling

SIZES = {"image_size": 16, "width": 16, "multipliers": (1, 2), "depth": 1, "attention": (8,), "head_width": 8,
         "groups": 4, "dropout": 0.0}  # fmt: skip
SHIPPED = Path(dalle_cli.__file__).parent / "bundles"
DECODER = {**SIZES, "n_embedding": 6, "context_width": 12, "n_text": 5, "n_text_vocab": 9, "text_layers": 1,
           "text_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A decoder that is guided in 7 steps, and an upsampler of 3."""
    folder = tmp_path_factory.mktemp("bundle")
    decoder, upsampler = build(DecoderConfig, DECODER, ""), build(UpsamplerConfig, {**SIZES, "image_size": 32,
                               "low_size": 16, "attention": ()}, "")  # fmt: skip
    for name, model, config, sampling in (
        ("decoder", Decoder(decoder), decoder, {"steps": 7, "guidance": 2.0}),
        ("upsampler", Upsampler(upsampler), upsampler, {"steps": 3}),
    ):
        header = {"model": vars(config), "sampling": sampling}
        save_tensors(folder / f"{name}.safetensors", f"weights.{name}", model.state_dict(), header, [])
    return folder


def attention(*args, **kwargs):
    """Operations of attention on CPU, which torch's table lacks."""
    return sdpa_flop(*args, **kwargs)


attention._get_raw = True  # the formula takes tensors
ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}


def counted(call):
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def test_operations_are_those_of_real_calls(bundle):
    decoder, upsampler = plan_sampling(str(bundle), n=3, keep=2, device="cpu", rate=1e9)
    assert (decoder.calls, upsampler.calls) == (1 + 7, 3)
    device = arithmetic("cpu", "float32").device
    model = loading.decoder(open_artifact(bundle / "decoder.safetensors"), device)
    rows = 6  # three candidates, guided
    given, lengths = torch.ones(rows, dtype=torch.bool), torch.ones(rows).long()
    inputs = torch.randn(rows, 6), given, torch.zeros(rows, 5).long(), lengths
    conditioning = model.condition(*inputs)
    x, t = torch.randn(rows, 3, 16, 16), torch.zeros(rows).long()
    expected = counted(lambda: model.condition(*inputs)) + 7 * counted(lambda: model(x, t, conditioning))
    assert decoder.flops == pytest.approx(expected, rel=0.02)
    large = torch.randn(2, 3, 32, 32)
    real = loading.upsampler(open_artifact(bundle / "upsampler.safetensors"), device)
    assert upsampler.flops == pytest.approx(3 * counted(lambda: real(large, torch.zeros(2).long(), large)), rel=0.02)
    assert decoder.weights == sum(p.nbytes for p in model.parameters())
    assert decoder.seconds >= decoder.flops / 1e9


def test_more_candidates_take_more(bundle):
    one, many = (plan_sampling(str(bundle), n, 1, "cpu", 1e9) for n in (1, 8))
    assert many[0].activations > 4 * one[0].activations
    assert many[1] == one[1]  # the upsampler enlarges what is kept


@pytest.mark.parametrize("name", ["shapes", "emoji"])
def test_command_on_shipped_bundles(name):
    told = json.loads(run_ok("plan", SHIPPED / name, "-n", "4", "--rate", "1e10", "--json"))["models"]
    assert list(told) == ["clip", "dvae", "prior"]
    assert told["prior"]["calls"] == 256
    assert (
        told["prior"]["weights"]
        == 4 * bundles.weights(str(SHIPPED / name), "weights.prior.codes").headers[0].n_parameters
    )
    assert "together" in run_ok("plan", SHIPPED / name, "--rate", "1e10")


def test_neither_recipe_nor_bundle():
    assert "found no such file" in run_bad("plan", "nothing")
