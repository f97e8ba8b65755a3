"""Small random CLIPs in the files of their publishers, made by the publishers' own code."""

import json
import warnings

import torch
from caption_samples import captions
from package_files import by_path
from safetensors.torch import save_file
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers, trainers

LENGTH = 12
TEXTS = ["a red dog", "", "painting of an avocado armchair", "tutu radish walking " * 9, "the blue radish"]


def vocabulary():
    """`vocab.json` and `merges.txt` of CLIP's kind: bytes, some words, and the two special tokens last."""
    library = Library(models.BPE(end_of_word_suffix="</w>"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    library.train_from_iterator([*captions("english", n=300, blanks=(" ",)), *" ".join(letters).split()], trainer)
    model = json.loads(library.to_str())["model"]
    vocab = {**model["vocab"], "<|startoftext|>": len(model["vocab"]), "<|endoftext|>": len(model["vocab"]) + 1}
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return vocab, f"#version: 0.2\n{merges}\n"


def write_tokenizer(folder):
    """The files of the tokenizer in `folder`; how many tokens there are."""
    vocab, merges = vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text(merges)
    return len(vocab)


def published_tokens(folder, texts=TEXTS):
    """The publisher's tokens of texts, padded with 0."""
    from transformers import CLIPTokenizer

    pairs = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().split("\n")[1:-1]]
    own = CLIPTokenizer(vocab=json.loads((folder / "vocab.json").read_text()), merges=pairs)
    rows = own(list(texts), truncation=True, max_length=LENGTH)["input_ids"]
    tokens = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def disturbed(model):
    """The model with norms and biases that are not at their first values, so that each of them counts."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def transformers_config(n_vocab, activation="quick_gelu", hidden=96):
    """The config of a CLIP whose sizes all differ."""
    from transformers import CLIPConfig

    text = {
        "vocab_size": n_vocab, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": LENGTH, "hidden_act": activation,
        "bos_token_id": n_vocab - 2, "eos_token_id": n_vocab - 1, "projection_dim": 20,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": hidden, "num_hidden_layers": 3, "num_attention_heads": 3,
        "image_size": 16, "patch_size": 4, "hidden_act": activation, "projection_dim": 20,
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)


def save_transformers(folder, activation="quick_gelu", pickled=False):
    """A `transformers.CLIPModel` with its tokenizer."""
    from transformers import CLIPModel

    torch.manual_seed(1)
    model = disturbed(CLIPModel(transformers_config(write_tokenizer(folder), activation)))
    model.save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        state = {**model.state_dict(), "text_model.embeddings.position_ids": torch.arange(LENGTH)[None]}
        torch.save(state, folder / "pytorch_model.bin")
    return model


def save_encoders(folder, hidden=52):
    """Text and vision encoders in folders of their own, as Kandinsky has them."""
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    torch.manual_seed(2)
    config = transformers_config(write_tokenizer(folder / "tokenizer"), "gelu", hidden)
    text = disturbed(CLIPTextModelWithProjection(config.text_config))
    vision = disturbed(CLIPVisionModelWithProjection(config.vision_config))
    text.save_pretrained(folder / "text_encoder")
    vision.save_pretrained(folder / "image_encoder")
    return text, vision


def open_clip_model(n_vocab, quick_gelu, width=24, head_width=8, text_width=16):
    """open_clip's CLIP and the `model_cfg` that describes it."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = {"image_size": 16, "layers": 2, "width": width, "patch_size": 4, "head_width": head_width}
    text = {"context_length": LENGTH, "vocab_size": n_vocab, "width": text_width, "layers": 3}
    text["heads"] = 2 if text_width < 64 else text_width // 64
    torch.manual_seed(3)
    model = disturbed(CLIP(20, CLIPVisionCfg(**vision), CLIPTextCfg(**text), quick_gelu=quick_gelu))
    return model, {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}


def save_open_clip(folder, quick_gelu=False):
    """open_clip's folder, as its hub repositories are."""
    model, config = open_clip_model(write_tokenizer(folder), quick_gelu)
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model


def save_training_checkpoint(folder, name="epoch_3.pt"):
    """A checkpoint of open_clip's trainer, which tells no sizes: heads are 64 wide."""
    model, _ = open_clip_model(write_tokenizer(folder), "quickgelu" in name, 128, 64, 64)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "a run", "state_dict": state}, folder / name)
    return model


def openai_state():
    """A state dict of OpenAI's layout in float16, and the model that open_clip builds of it."""
    from open_clip.model import build_model_from_openai_state_dict

    model, _ = open_clip_model(len(vocabulary()[0]), True, 128, 64, 64)
    state = {name: t.half() for name, t in model.state_dict().items()}
    numbers = {"input_resolution": 16, "context_length": LENGTH, "vocab_size": len(vocabulary()[0])}
    state |= {name: torch.tensor(number) for name, number in numbers.items()}
    return state, build_model_from_openai_state_dict(dict(state)).float()


def save_openai(folder, archive=False):
    """OpenAI's weights as a state dict or as a TorchScript archive."""
    write_tokenizer(folder)
    state, model = openai_state()
    if not archive:
        torch.save(state, folder / "ViT-tiny.pt")
        return model
    save_archive(model, state, folder / "ViT-tiny.pt")
    return model


def save_archive(model, state, path):
    """A TorchScript archive, in which the numbers are buffers."""
    for name in ("input_resolution", "context_length", "vocab_size"):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, state[name])
    example = torch.zeros(1, 3, 16, 16), torch.zeros(1, LENGTH, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that the trace takes for constants
        torch.jit.trace(model, example, check_trace=False).save(str(path))


def save_openais_own(folder):
    """The archive of a model of OpenAI's own code. Raises: ModuleNotFoundError where it is not installed."""
    n_vocab = write_tokenizer(folder)
    torch.manual_seed(4)
    model = disturbed(by_path("clip", "model.py").CLIP(20, 16, 2, 128, 4, LENGTH, n_vocab, 64, 1, 3))
    numbers = {"input_resolution": 16, "context_length": LENGTH, "vocab_size": n_vocab}
    save_archive(model, {name: torch.tensor(number) for name, number in numbers.items()}, folder / "ViT-tiny.pt")
    return model
