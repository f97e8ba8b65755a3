"""The encoder-decoder prior: its caches against its forward pass, packing, and what sampling needs of it.

tests/importing/test_dalle_mini.py compares it with min-dalle's own modules.
"""

import pytest
import torch
from planted_weights import randomized
from torch import Tensor

from dalle_cli.errors import DalleError
from dalle_cli.models.bart import EncoderDecoderConfig, EncoderDecoderPrior
from dalle_cli.models.cache import Prompt
from dalle_cli.models.kernels import PackedLinear, packs
from dalle_cli.models.packed import pack
from dalle_cli.sampling import memory
from dalle_cli.sampling.autoregressive import sample_codes
from dalle_cli.sampling.categorical import CategoricalOptions

SMALL = EncoderDecoderConfig(
    n_layer=2, n_head=2, n_embd=32, n_hid=44, n_text_vocab=30, n_text=6, n_image_vocab=20, grid=4
)
N = SMALL.grid**2


@pytest.fixture
def prior() -> EncoderDecoderPrior:
    torch.manual_seed(0)
    return randomized(EncoderDecoderPrior(SMALL)).eval()


def captions() -> tuple[Tensor, Tensor]:
    """Two captions and the null caption."""
    tokens = torch.tensor([[0, 5, 6, 7, 2, 1], [0, 9, 2, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    return tokens, torch.tensor([5, 3, 0])


def grids(n: int) -> Tensor:
    return torch.randint(SMALL.n_image_vocab, (n, 4, 4), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("candidates", [1, 2])
@pytest.mark.parametrize("static", [False, True])
@torch.inference_mode()
def test_steps_give_what_the_forward_pass_gives(prior, candidates, static):
    (tokens, lengths), codes = captions(), grids(3 * candidates)
    rows = torch.arange(3).repeat_interleave(candidates)
    expected = prior(tokens[rows], lengths[rows], codes)[1]
    cache = prior.cache(prior.prefill(tokens, lengths), candidates, static)
    for _ in range(2):  # the second time in the same buffers
        cache.restart()
        found = [cache.logits, *(prior.step(codes.flatten(1)[:, p], cache) for p in range(N - 1))]
        torch.testing.assert_close(torch.stack(found, dim=1), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_captions_prefilled_apart_and_joined(prior):
    tokens, lengths = captions()
    parts = [prior.prefill(tokens[i : i + 1], lengths[i : i + 1]) for i in range(3)]
    whole, joined = prior.cache(prior.prefill(tokens, lengths)), prior.cache(Prompt.join(parts))
    codes = torch.tensor([1, 2, 3])
    torch.testing.assert_close(prior.step(codes, joined), prior.step(codes, whole), rtol=0, atol=1e-5)
    twice = prior.cache(parts[0].repeat(2))
    found = prior.step(codes[:2], twice)
    torch.testing.assert_close(found[:1], prior.step(codes[:1], prior.cache(parts[0])), rtol=0, atol=1e-5)


def test_the_null_caption_is_bos_and_eos(prior):
    (tokens, lengths), codes = captions(), grids(1)
    null = torch.tensor([[0, 2, 1, 1, 1, 1]])
    assert torch.equal(prior(tokens[2:], lengths[2:], codes)[1], prior(null, torch.tensor([2]), codes)[1])
    other = prior(torch.tensor([[0, 3, 2, 1, 1, 1]]), torch.tensor([3]), codes)[1]
    assert not torch.allclose(prior(null, torch.tensor([2]), codes)[1], other, atol=1e-3)


def test_text_is_not_predicted(prior):
    (tokens, lengths), codes = captions(), grids(3)
    assert prior(tokens, lengths, codes)[0].shape == (3, 0, 30)
    assert not prior.predicted(lengths).any()
    assert prior.written(lengths).sum(1).tolist() == [5, 3, 0]


@pytest.mark.parametrize("guidance", [1.0, 10.0])
def test_a_candidate_is_the_same_in_any_batch(prior, guidance):
    tokens, lengths = captions()
    options = CategoricalOptions(temperature=0.8, guidance_scale=guidance)
    made = [
        sample_codes(prior, tokens, lengths, range(5), 7, options, captions=[0, 0, 1, 2, 2], batch_size=batch_size)
        for batch_size in (5, 1, 2)
    ]
    whole = made[0]
    assert all(torch.equal(other, whole) for other in made)
    assert len({tuple(grid.flatten().tolist()) for grid in whole}) == 5


def test_guidance_matters(prior):
    tokens, lengths = captions()
    made = [
        sample_codes(prior, tokens[:1], lengths[:1], [0], 0, CategoricalOptions(guidance_scale=scale))
        for scale in (1.0, 10.0)
    ]
    assert not torch.equal(*made)


def test_known_codes_are_kept_and_seen(prior):
    tokens, lengths = captions()
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:2] = True
    made = [
        sample_codes(prior, tokens[:1], lengths[:1], [0], 0, known=known, keep=keep)[0]
        for known in (grids(2)[0], grids(2)[1], grids(2)[0])
    ]
    assert torch.equal(made[0][:2], grids(2)[0][:2])
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0][2:], made[1][2:])


# ---- packed


@pytest.mark.skipif(not packs(torch.float32), reason="no packed matrices in this build of torch")
@pytest.mark.parametrize(
    ("dtype", "int8", "atol"), [(torch.float32, False, 1e-5), (torch.bfloat16, False, 0.1), (torch.bfloat16, True, 0.2)]
)
@torch.inference_mode()
def test_packed_steps_are_close(prior, dtype, int8, atol):
    (tokens, lengths), codes = captions(), grids(3)
    expected = prior(tokens, lengths, codes)[1]
    packed = pack(prior, 3, dtype, int8)
    assert pack(packed, 3, dtype) is packed
    assert isinstance(packed.image_head, PackedLinear)
    assert packed.image_head(torch.zeros(1, 32)).dtype == torch.float32  # guidance multiplies what rounding leaves
    assert not any(isinstance(m, torch.nn.Linear) for m in packed.modules())
    cache = packed.cache(packed.prefill(tokens, lengths))
    found = torch.stack([cache.logits, *(packed.step(codes.flatten(1)[:, p], cache) for p in range(N - 1))], dim=1)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < atol * expected.std()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_a_step_is_one_program(prior):
    """With a static cache all steps are one graph, which is given codes and tensors whose places are fixed."""
    (tokens, lengths), codes, graphs, given = captions(), grids(3).flatten(1), [], []
    expected = prior(tokens, lengths, codes.view(3, 4, 4))[1].detach()

    def backend(graph, _):
        graphs.append(graph)
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        given.extend(n for n in inputs if "_dynamo_static_input_type" not in n.meta["tensor_dict"])
        return graph.forward

    torch._dynamo.reset()
    packed = pack(prior, 3, torch.float32, plain=True)
    with torch.inference_mode():
        step = torch.compile(packed.step, backend=backend)
        cache = packed.cache(packed.prefill(tokens, lengths), 1, True)
        found = torch.stack([cache.logits, *(step(codes[:, p], cache) for p in range(N - 1))], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(graphs) == len(given) == 1


# ---- memory, and what is refused


def test_a_batch_fits_into_memory(prior, monkeypatch):
    one = memory.candidate_bytes(prior, True, False, torch.float32)
    caches = 2 * 2 * SMALL.n_layer * (N - 1) * SMALL.n_embd * 4
    assert caches < one < caches + 2**16
    assert memory.candidate_bytes(prior, True, True, torch.float32) > one
    monkeypatch.setattr(memory, "free_memory", lambda device: 20 * one)
    assert memory.fitting_batch(prior, 100, True, False, torch.float32) == 10


def test_other_shapes_are_refused(prior):
    tokens, lengths = captions()
    with pytest.raises(DalleError, match="captions of 6 positions, found 5"):
        prior.prefill(tokens[:, :5], lengths)
    with pytest.raises(DalleError, match="codes of 4 x 4, found 3 x 3"):
        prior(tokens, lengths, torch.zeros(3, 3, 3, dtype=torch.long))
