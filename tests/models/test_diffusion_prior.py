"""The diffusion prior: against its twin and another implementation, and whether it looks at all that it is given."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from dalle_cli.diffusion.losses import losses
from dalle_cli.errors import DalleError
from dalle_cli.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
from dalle_cli.models.unet import sinusoids
from dalle_cli.sampling.embeddings import prior_process
from reference import embedding_priors as reference

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_text_vocab": 11, "n_text": 4, "n_embedding": 6}


def prior(seed=0, **more):
    """A double prior with large weights, so that everything in it matters."""
    torch.manual_seed(seed)
    model = DiffusionPrior(DiffusionPriorConfig(**{**SIZES, **more})).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.4)
    return model.requires_grad_(False)


def inputs(rows=4, seed=1):
    """x, t, tokens, lengths (one of them null, one whole), z_t."""
    torch.manual_seed(seed)
    x, z_t = torch.randn(2, rows, SIZES["n_embedding"], dtype=torch.double)
    lengths = torch.tensor([0, 2, SIZES["n_text"], 3])[:rows]
    tokens = torch.randint(0, SIZES["n_text_vocab"], (rows, SIZES["n_text"]))
    return x, torch.tensor([0, 7, 450, 999])[:rows], tokens, lengths, F.normalize(z_t, dim=-1)


def test_twin():
    model, (x, t, tokens, lengths, z_t) = prior(), inputs()
    ours = model(x, t.double(), tokens, lengths, z_t)
    for row in range(len(x)):
        args = (x[row], int(t[row]), tokens[row].tolist(), int(lengths[row]), z_t[row])
        expected = reference.diffusion_prior(*args, model.state_dict(), SIZES)
        torch.testing.assert_close(ours[row], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("block", ["paper", "modern"])
def test_a_caption_read_once(block):
    """Behind a prefix, each serving several rows, the answers are those of whole streams."""
    model, (_, _, tokens, lengths, z_t) = prior(block=block), inputs()
    prompt = model.prefill(tokens, lengths, z_t)
    x, t = torch.randn(12, SIZES["n_embedding"], dtype=torch.double), torch.arange(12) * 80.5
    whole = model(x, t, *(a.repeat_interleave(3, 0) for a in (tokens, lengths, z_t)))
    torch.testing.assert_close(model.step(x, t, prompt), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", ["paper", "modern"])
def test_of_the_last_block_only_the_query_is_made(block):
    """Answers, gradients and what was read of a caption are those of a stream that every block makes whole."""
    model = prior(block=block, n_layer=3).requires_grad_(True)
    x, t, tokens, lengths, z_t = inputs()
    found, made = {}, []
    model.blocks[-1].register_forward_hook(lambda module, args, out: made.append(out.shape[1]))
    for way, lasts in (("query", model.lasts), ("whole", (None, None, None))):
        model.lasts = lasts
        answers = model(x, t, tokens, lengths, z_t)
        model.zero_grad()
        answers.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            prompt = model.prefill(tokens, lengths, z_t)
            found[way] = [answers, *grads, *prompt.keys, *prompt.values, model.step(x, t, prompt)]
    torch.testing.assert_close(found["query"], found["whole"], rtol=1e-12, atol=1e-12)
    assert all(bool(g.any()) for g in grads)
    positions = SIZES["n_text"] + 4
    assert made == [1, 1, 1, positions, positions - 3, 3]


def test_operations_are_those_of_the_layers():
    """Six for each weight and place that it is used at, counted by hooks, and twelve for each width and pair."""
    model, used = prior(n_layer=3), []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, args, out: used.append(out[0].numel() * m.in_features))
    model(*inputs())
    length = SIZES["n_text"] + 4
    pairs = 2 * length * (length + 1) // 2 + length
    gelu_linears = 4 * SIZES["n_embd"] ** 2 * (2 * length + 1)  # `mlp_out`, which is not called as a module
    assert model.flops() == 6 * (sum(used) + gelu_linears) + 12 * SIZES["n_embd"] * pairs


@pytest.mark.parametrize("block", ["paper", "modern"])
@pytest.mark.parametrize("name", ["x", "t", "tokens", "lengths", "z_t"])
def test_looks_at_everything(name, block):
    """Each input changes the answer of each row that it should, and of no other."""
    model, given = prior(block=block), inputs()
    names = ["x", "t", "tokens", "lengths", "z_t"]
    changed = list(given)
    at = names.index(name)
    changed[at] = {
        "x": given[0] + 1,
        "t": given[1] + 1,
        "tokens": (given[2] + 1) % SIZES["n_text_vocab"],
        "lengths": torch.tensor([1, 3, 3, 2]),
        "z_t": -given[4],
    }[name]
    differs = (model(*given) - model(*changed)).abs().amax(-1) > 1e-3
    seen = [name not in ("tokens", "z_t"), True, True, True]  # the first caption is null
    assert differs.tolist() == seen


def test_null_knows_nothing_of_a_caption():
    model, (x, t, tokens, lengths, z_t) = prior(), inputs()
    null = torch.zeros_like(lengths)
    one = model(x, t, tokens, null, z_t)
    other = model(x, t, tokens.flip(0), null, z_t.flip(0))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.allclose(one, model(x, t, tokens, torch.ones_like(lengths), z_t))
    # beyond a caption's end nothing is read
    beyond = torch.where(torch.arange(SIZES["n_text"]) < lengths[:, None], tokens, 10 - tokens)
    torch.testing.assert_close(model(x, t, tokens, lengths, z_t), model(x, t, beyond, lengths, z_t), rtol=0, atol=0)


def theirs(config, text_width=None):
    """diffusers' prior of the same sizes, and the names of its weights in ours."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    oracle = diffusers.PriorTransformer(
        num_attention_heads=config.n_head,
        attention_head_dim=config.n_embd // config.n_head,
        num_layers=config.n_layer,
        embedding_dim=config.n_embedding,
        num_embeddings=config.n_text,
        additional_embeddings=4,
    )
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, 0, 0.6)
    return oracle.double().eval().requires_grad_(False)


def translated(oracle, model, states):
    """Its weights as ours, with our tokens standing for `states`, rows of what it takes for a caption."""
    told, ours = oracle.state_dict(), model.state_dict()
    simple = {
        "time_in": "time_embedding.linear_1",
        "time_out": "time_embedding.linear_2",
        "image_in": "proj_in",
        "norm": "norm_out",
        "out": "proj_to_clip_embeddings",
    }
    for mine, their in simple.items():
        for part in ("weight", "bias"):
            ours[f"{mine}.{part}"] = told[f"{their}.{part}"]
    for i in range(model.config.n_layer):
        block, layer = f"blocks.{i}", f"transformer_blocks.{i}"
        for part in ("weight", "bias"):
            ours[f"{block}.qkv.{part}"] = torch.cat([told[f"{layer}.attn1.to_{n}.{part}"] for n in "qkv"])
            pairs = {"attention_out": "attn1.to_out.0", "mlp_in": "ff.net.0.proj", "mlp_out": "ff.net.2"}
            for mine, their in {**pairs, "norm_1": "norm1", "norm_2": "norm3"}.items():
                ours[f"{block}.{mine}.{part}"] = told[f"{layer}.{their}.{part}"]
    ours["position.weight"] = told["positional_embedding"][0]
    ours["query"] = told["prd_embedding"][0, 0]
    ours["captions.z_in.weight"] = told["embedding_proj.weight"] / model.config.n_embedding**0.5
    ours["captions.z_in.bias"] = told["embedding_proj.bias"]
    ours["captions.token.weight"] = F.linear(
        states, told["encoder_hidden_states_proj.weight"], told["encoder_hidden_states_proj.bias"]
    )
    model.load_state_dict(ours)


@pytest.mark.parametrize("size", [{}, {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_text": 7, "n_embedding": 10}])
def test_parity_with_diffusers(size):
    """The same random weights, in float64; tokens stand for rows of a table that it is given as hidden states."""
    model = DiffusionPrior(DiffusionPriorConfig(**{**SIZES, **size})).double().eval()
    config = model.config
    oracle = theirs(config)
    states = torch.randn(config.n_text_vocab, config.n_embedding, dtype=torch.double)
    translated(oracle, model, states)
    tokens = torch.randint(0, config.n_text_vocab, (5, config.n_text))
    x, z_t = torch.randn(2, 5, config.n_embedding, dtype=torch.double)
    mask = torch.ones_like(tokens, dtype=torch.bool)  # without one it leaves out causality, too
    lengths = torch.full((5,), config.n_text)
    for t, tolerance in ((0, 1e-10), (1, 1e-5), (999, 1e-4)):  # it has timesteps in float32
        steps = torch.full((5,), t)
        expected = oracle(x, steps, z_t, states[tokens], mask).predicted_image_embedding
        ours = model(x, steps, tokens, lengths, z_t)
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
        assert expected.std(0).min() > 0.01  # rows are not alike
    early = oracle(x, torch.zeros(5).long(), z_t, states[tokens], mask).predicted_image_embedding
    assert (early - expected).abs().max() > 0.01  # a hundred times the tolerance


def test_loss_is_the_process_own():
    """Mean squared error of x_start, as the losses of diffusion have it."""
    model, (_, _, tokens, lengths, z_t) = prior(n_timestep=100), inputs()
    process = prior_process(model)
    assert (len(process.schedule), process.prediction) == (100, "x_start")
    x_start, noise = torch.randn(2, 4, 6, dtype=torch.double)
    t = torch.tensor([0, 33, 66, 99])
    x = process.add_noise(x_start, t, noise)
    output = model(x, t, tokens, lengths, z_t)
    expected = losses(process, output, x_start, x, t, noise).total.mean()
    torch.testing.assert_close(model.loss(x, t, tokens, lengths, z_t, x_start)[0], expected)


def test_features_of_timesteps():
    features = sinusoids(torch.tensor([0.0, 3.5], dtype=torch.double), 6)
    assert features[0].tolist() == [1, 1, 1, 0, 0, 0]
    for i in range(3):
        angle = torch.tensor(3.5 / 10_000 ** (i / 3), dtype=torch.double)
        torch.testing.assert_close(features[1, i], angle.cos())
        torch.testing.assert_close(features[1, 3 + i], angle.sin())
    assert sinusoids(torch.tensor([999]), 6).dtype == torch.float32
    assert sinusoids(torch.tensor([999.5], dtype=torch.bfloat16), 6).dtype == torch.float32


def test_size_of_the_papers():
    """24 layers of 2048 (from memory), with the vocabulary of the published CLIP."""
    with torch.device("meta"):
        model = DiffusionPrior(DiffusionPriorConfig())
    inner = sum(p.numel() for block in model.blocks for p in block.parameters())
    assert inner == pytest.approx(24 * 12 * 2048**2, rel=0.01)
    assert 1.2e9 < sum(p.numel() for p in model.parameters()) < 1.4e9


def test_sizes_that_do_not_fit():
    cases = {
        "kind": ("autoregressive", 'expected kind "diffusion"'),
        "n_head": (5, "multiple of prior.n_head"),
        "n_text": (0, "n_text of at least 1"),
        "n_timestep": (1, "n_timestep of at least 2"),
        "schedule": ("sigmoid", "found 'sigmoid'"),
        "block": ("old", 'found "old"'),
        "dropout": (2.0, "found 2.0"),
    }
    for name, (value, said) in cases.items():
        with pytest.raises(DalleError, match=said):
            DiffusionPriorConfig(**{**SIZES, name: value})
    with pytest.raises(DalleError, match="n_embd even"):
        DiffusionPriorConfig(**{**SIZES, "n_embd": 9, "n_head": 3})
    model, (x, t, tokens, lengths, z_t) = prior(), inputs()
    with pytest.raises(DalleError, match="expected captions of 4 positions and embeddings of 6, found 3 and 6"):
        model(x, t, tokens[:, :3], lengths, z_t)
    with pytest.raises(DalleError, match="found 4 and 5"):
        model.prefill(tokens, lengths, z_t[:, :5])
    assert dataclasses.asdict(model.config)["n_embedding"] == 6
