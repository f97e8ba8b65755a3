"""Training that starts from Karlo's decoder, whose captions are states of its CLIP."""

import pytest
from comparisons import assert_equal
from conftest import run_bad, run_cli, run_ok
from interruptions import Crash, after_update
from stage_runs import lasting_rows
from test_karlo import bundle, inputs, published  # noqa: F401 - fixtures

from dalle_cli.artifacts import open_artifact
from dalle_cli.artifacts.weights import load_tensors


def settings(**changes):
    values = {"steps": 20, "batch_size": 8, "warmup": 0, "lr": 1e-3, "ema": 0.5, "validation": 0.25, "log_every": 5}
    values |= {"grid_images": 2, "grid_steps": 2, "checkpoint_every": 8, **changes}
    return [word for k, v in values.items() for word in ("--set", f"decoder.train.{k}={v}")]


def test_fine_tuning_lowers_the_error_and_resumes_exactly(bundle, inputs, data, tmp_path):  # noqa: F811
    still, tuned, cut = (tmp_path / f"{name}.safetensors" for name in ("still", "tuned", "cut"))
    command = ("train-decoder", data, inputs[1], "--init", bundle, "--dtype", "float32")
    captions = ("--captions", inputs[0])
    run_ok(*command, *captions, *settings(steps=1, lr=0.0), "-o", still)
    before, same = (load_tensors(open_artifact(path)) for path in (bundle / "decoder.safetensors", still))
    assert_equal(same, before)
    run_ok(*command, *captions, *settings(), "-o", tuned)
    first, last = (lasting_rows(out)[-1]["validation"]["mse_held_out"] for out in (still, tuned))
    assert last < 0.8 * first
    with after_update(11), pytest.raises(Crash):
        run_cli(*command, *captions, *settings(), "-o", cut)
    run_ok(*command, *captions, *settings(), "-o", cut)
    assert cut.read_bytes() == tuned.read_bytes()
    assert open_artifact(tuned).config["sampling"] == open_artifact(bundle / "decoder.safetensors").config["sampling"]
    lone = run_bad(*command, *settings(), "-o", tmp_path / "none.safetensors")
    assert lone.endswith("found none; give --captions")


def test_upsamplers_with_a_second_unet_are_not_trained(bundle, data, tmp_path):  # noqa: F811
    found = run_bad("train-decoder", data, "--upsampler", 1, "--init", bundle, "-o", tmp_path / "upsampler.safetensors")
    assert "expected an upsampler of one U-Net to train" in found
