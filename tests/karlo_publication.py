"""A tiny Karlo in its publisher's format, made by diffusers and transformers, with the CLIP that goes with it."""

import json

import torch
from planted_weights import randomized

WIDTH, TEXT = 16, 77  # of embeddings and text states; length of captions
WORDS = ("a", "red", "blue", "circle", "bear", "on", "the", "grass")


def tokenizer():
    """CLIP's byte-level BPE with a few words."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
    merges = list(dict.fromkeys(merges))
    tokens += [left + right for left, right in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token="!", model_max_length=TEXT)


def clip(n_vocab):
    """A CLIP of two towers; its end token has the highest id, as in the published ones."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * WIDTH}
    ends = {"bos_token_id": n_vocab - 2, "eos_token_id": n_vocab - 1, "pad_token_id": 0}
    text = {"vocab_size": n_vocab, "max_position_embeddings": TEXT, **ends}
    vision = {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision}, projection_dim=WIDTH)
    return randomized(CLIPModel(config)).eval()


def text_encoder(whole):
    """Its text tower with the projection, as the pipeline has it."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**{**whole.config.text_config.to_dict(), "projection_dim": WIDTH})
    model = CLIPTextModelWithProjection(config)
    missing, _ = model.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    return model.eval()


def prior():
    from diffusers import PriorTransformer

    model = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=WIDTH, num_embeddings=TEXT,
        additional_embeddings=4,
    )  # fmt: skip
    randomized(model, seed=1, scale=0.7)  # so that noise and caption move z_i
    model.clip_std.data.abs_().add_(0.5)
    return model


def unets():
    from diffusers import UNet2DConditionModel, UNet2DModel

    own = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    decoder = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, cross_attention_dim=24, attention_head_dim=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", class_embed_type="identity",
        resnet_time_scale_shift="scale_shift", **own,
    )  # fmt: skip
    kinds = {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}
    sizes = {"sample_size": 32, "in_channels": 6, "out_channels": 3, "add_attention": False}
    upsamplers = [UNet2DModel(**sizes, **kinds, **own) for _ in range(2)]
    return [randomized(model, seed, 0.15) for seed, model in enumerate([decoder, *upsamplers], 2)]


def components():
    """Everything that diffusers' `UnCLIPPipeline` is made of, and the whole CLIP."""
    from diffusers import UnCLIPScheduler
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    words = tokenizer()
    whole = clip(len(words))
    projection = UnCLIPTextProjModel(
        clip_embeddings_dim=WIDTH, time_embed_dim=128, cross_attention_dim=24, clip_extra_context_tokens=4
    )
    decoder, first, last = unets()
    schedule = {"variance_type": "fixed_small_log", "clip_sample_range": 1.0, "prediction_type": "epsilon"}
    parts = {
        "prior": prior(), "decoder": decoder, "text_proj": randomized(projection, 7),
        "text_encoder": text_encoder(whole), "tokenizer": words, "super_res_first": first, "super_res_last": last,
        "prior_scheduler": UnCLIPScheduler(**{**schedule, "clip_sample_range": 5.0, "prediction_type": "sample"}),
        "decoder_scheduler": UnCLIPScheduler(**{**schedule, "variance_type": "learned_range"}),
        "super_res_scheduler": UnCLIPScheduler(**schedule),
    }  # fmt: skip
    return parts, whole


def in_double(scheduler):
    """A scheduler with its tables in float64: in float32 the last step scales what it predicts by 1 - 5e-4."""
    scheduler.betas, scheduler.one = scheduler.betas.double(), scheduler.one.double()
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def publish(parts, whole, folder):
    """Write the pipeline and its CLIP as their publishers do: folder/karlo, folder/clip."""
    for name, part in parts.items():
        part.save_pretrained(folder / "karlo" / name)
    index = {"_class_name": "UnCLIPPipeline", "_diffusers_version": "0.14.0"}
    (folder / "karlo" / "model_index.json").write_text(json.dumps(index))
    whole.save_pretrained(folder / "clip")
    parts["tokenizer"].save_pretrained(folder / "clip")
    return folder / "karlo", folder / "clip"


def publish_eclipse(model, folder, width=WIDTH):
    """A prior's weights in ECLIPSE's layout: no timestep, one position less; of another width, the first columns."""
    from safetensors.torch import save_file

    tensors = {name: t for name, t in model.state_dict().items() if not name.startswith("time_embedding.")}
    tensors["positional_embedding"] = tensors["positional_embedding"][:, :-1]
    for name in ("proj_in.weight", "embedding_proj.weight", "clip_mean", "clip_std"):
        tensors[name] = tensors[name][:, :width]
    for name in ("proj_to_clip_embeddings.weight", "proj_to_clip_embeddings.bias"):
        tensors[name] = tensors[name][:width]
    folder.mkdir(parents=True)
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, str(folder / "diffusion_pytorch_model.safetensors")
    )
    about = {"_class_name": "PriorTransformer", "additional_embeddings": 3, "num_attention_heads": 2}
    (folder / "config.json").write_text(json.dumps(about))
    return folder
