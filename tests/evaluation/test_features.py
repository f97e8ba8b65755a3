"""What pictures are compared by: files of each kind, their names, and faults."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dalle_cli.artifacts import open_artifact
from dalle_cli.data import tokenizer as tokenizers
from dalle_cli.devices import arithmetic
from dalle_cli.errors import DalleError
from dalle_cli.evaluation import features as module
from dalle_cli.evaluation.features import load_features, title
from dalle_cli.models.inception import InceptionV3
from dalle_cli.pipelines import loading

CPU = arithmetic("cpu", "float32")


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A checkpoint without counts of batches, as the published one may be; and the network it holds."""
    torch.manual_seed(0)
    network = InceptionV3().eval()
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    folder = tmp_path_factory.mktemp("inception")
    torch.save(state, folder / "inception.pth")
    save_file(state, folder / "inception.safetensors")
    return folder, network


def test_a_clip_embeds_pictures_and_captions(chain, pictures):
    found = load_features(None, str(chain.model), CPU)
    clip = loading.clip(open_artifact(chain.clip), torch.device("cpu"))
    np.testing.assert_allclose(found(pictures).features, clip.encode_image(pictures).detach(), rtol=0, atol=1e-5)
    assert (found.width, found.classes) == (16, 0)
    assert found.name == f"clip-{open_artifact(chain.clip).digest[:8]}"
    assert title(found) == f"Frechet distance ({found.name})"
    tokens, lengths, _ = tokenizers.load(chain.tokenizer).encode_batch(["a red circle"], clip.config.n_text)
    rows = [torch.from_numpy(x.astype(np.int64)) for x in (tokens, lengths)]
    np.testing.assert_allclose(found.captions(["a red circle"]), clip.encode_text(*rows).detach(), rtol=0, atol=1e-5)
    for spec in (chain.clip, chain.model):
        assert load_features(str(spec), None, CPU).digest == found.digest


@pytest.mark.parametrize("name", ["inception.pth", "inception.safetensors"])
def test_inception_is_read_from_either_format(inception, pictures, name):
    folder, network = inception
    found = load_features(str(folder / name), None, CPU)
    with torch.inference_mode():
        expected = network(pictures)
    result = found(pictures)
    np.testing.assert_allclose(result.features, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.logits, expected @ network.fc.weight.detach().T, rtol=1e-4, atol=1e-5)
    assert (found.width, found.classes) == (2048, 1008)
    assert title(found) == f"Frechet distance (inception-v3-{found.digest[:8]})"


def test_only_the_published_file_is_called_fid(inception, monkeypatch):
    path = str(inception[0] / "inception.pth")
    assert module.PUBLISHED.startswith("6726825d")
    assert len(module.PUBLISHED) == 64
    monkeypatch.setattr(module, "PUBLISHED", module.digest_file(Path(path)))
    found = load_features(path, None, CPU)
    assert (title(found), found.name) == ("FID", "inception-v3")
    smaller = load_features(f"{path}:192", None, CPU)
    assert (title(smaller), smaller.width, smaller.classes) == ("Frechet distance (inception-v3:192)", 192, 0)
    assert smaller(torch.rand(1, 3, 8, 8)).features.shape == (1, 192)
    with pytest.raises(DalleError, match="a width of 64, 192, 768, 2048"):
        load_features(f"{path}:7", None, CPU)


def test_a_file_of_something_else_is_one_line(tmp_path, inception, chain):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Evil(), tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("no tensors")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "few.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    state = torch.load(inception[0] / "inception.pth")
    torch.save({**state, "fc.bias": torch.zeros(7)}, tmp_path / "shape.pth")
    for name in ("evil", "text", "few", "list", "shape"):
        with pytest.raises(DalleError, match="expected the Inception-v3 of pytorch-fid, found") as fault:
            load_features(str(tmp_path / f"{name}.pth"), None, CPU)
        assert "\n" not in str(fault.value)
    assert not (tmp_path / "ran").exists()
    for spec, words in (
        (str(chain.prior), "expected weights.clip, found weights.prior.codes"),
        (f"{chain.clip}:layer", "a CLIP without an output's name"),
        (str(tmp_path / "none.pth"), "found no such file"),
    ):
        with pytest.raises(DalleError, match=words):
            load_features(spec, None, CPU)


def test_a_file_of_a_hub_repository(inception, monkeypatch):
    asked = []

    def fetch(repo, file, revision):
        asked.append((repo, file, revision))
        return str(inception[0] / "inception.pth")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert load_features("hf://some/body/weights/net.pth@v2", None, CPU).width == 2048
    assert load_features("hf://some/body/net.pth:64", None, CPU).width == 64
    assert asked == [("some/body", "weights/net.pth", "v2"), ("some/body", "net.pth", None)]

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(DalleError, match=r"net\.pth in the hub repository some/body, found no network"):
        load_features("hf://some/body/net.pth", None, CPU)


@pytest.fixture
def network(tmp_path):
    """Writes ONNX files: means of channels, and twice those as class logits; layout, type and sizes as asked for."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    def write(shape, dtype=TensorProto.FLOAT, more=()):
        axes = [2, 3] if shape[1] == 3 else [1, 2]
        nodes = [
            helper.make_node("Cast", ["pixels"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Constant", [], ["axes"], value=helper.make_tensor("a", TensorProto.INT64, [2], axes)),
            helper.make_node("ReduceMean", ["float", "axes"], ["pool"], keepdims=0),
            helper.make_node("Add", ["pool", "pool"], ["logits"]),
        ]
        outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [shape[0], 3]) for n in ("pool", "logits")]
        outs.append(helper.make_tensor_value_info("float", TensorProto.FLOAT, shape))
        inputs = [helper.make_tensor_value_info("pixels", dtype, shape), *more]
        graph = helper.make_graph(nodes, "means", inputs, outs)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, tmp_path / "net.onnx")
        return tmp_path / "net.onnx"

    return write


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        (["n", 3, 20, 20], 1), ([2, 3, 20, 20], 1), (["n", 3, "h", "w"], 1), (["n", 20, 20, 3], 1),
        ([1, "h", "w", 3], 1), (["n", 3, 20, 20], 255),
    ],
)  # fmt: skip
def test_an_onnx_file_gets_the_pixels_it_asks_for(network, pictures, shape, scale):
    path = network(shape, {1: 1, 255: 2}[scale])  # FLOAT, UINT8
    found = load_features(f"{path}:pool,logits", None, CPU)
    result = found(pictures)
    expected = scale * pictures.mean(dim=(2, 3))
    np.testing.assert_allclose(result.features, expected, rtol=0, atol=1e-5 if scale == 1 else 0.5)
    np.testing.assert_allclose(result.logits, 2 * result.features)
    assert (found.width, found.classes) == (3, 3)
    assert found.name == f"net:pool-{found.digest[:8]}"
    assert load_features(str(path), None, CPU).classes == 0


def test_pictures_are_brought_to_the_size_of_an_onnx_file(network):
    path = network(["n", 3, 5, 9])
    ramp = torch.linspace(0, 1, 40).expand(1, 3, 40, 40)
    np.testing.assert_allclose(load_features(str(path), None, CPU)(ramp).features, 0.5, atol=1e-2)


def test_faults_of_onnx_files_are_one_line(network, tmp_path):
    from onnx import TensorProto, helper

    path = network(["n", 3, 8, 8])
    for output, words in (("none", "expected outputs of pool, logits, float"), ("float", "name another output")):
        with pytest.raises(DalleError, match=words):
            load_features(f"{path}:{output}", None, CPU)
    network(["n", 3, 8, 8], more=[helper.make_tensor_value_info("text", TensorProto.INT64, [1])])
    with pytest.raises(DalleError, match="expected one input"):
        load_features(str(path), None, CPU)
    (tmp_path / "text.onnx").write_text("nothing")
    with pytest.raises(DalleError, match="expected an ONNX file"):
        load_features(str(tmp_path / "text.onnx"), None, CPU)


def test_without_onnxruntime_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    (tmp_path / "net.onnx").write_text("nothing")
    with pytest.raises(DalleError, match=r"pip install 'dalle-cli\[onnx\]'"):
        load_features(str(tmp_path / "net.onnx"), None, CPU)
