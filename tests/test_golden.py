"""Golden outputs: what fixed inputs and seeds give, recorded in tests/golden/; a change of code must not change it.

Everything runs through the command line: the shipped bundles, every trainer for 20 updates on tiny data, and a tiny
DALL-E 2 chain made of these. All names that a rename may touch stand in the table below.

Float results differ by processor. So results are compared byte by byte (SHA-256 of tensors, never of files) only on a
machine with the recorded fingerprint: versions, the CPU's vector instructions, and the bits of some reference products.
On other machines the tolerant numbers beside each hash are compared: of codes the share of rows that are equal, of
floats a projection of each row, of weights their norm, and the logged losses.

`python tests/golden/record.py` records anew and says which entries changed.
"""

import hashlib
import itertools
import json
import re
import shutil
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_ok
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import dalle_cli

# The table: all names of commands, options, config keys, columns and log fields

PROMPTS = {
    "emoji": (
        "a noto style emoji of a red apple", "a twemoji style emoji of a cat face",
        "a fluent 3d style emoji of a rocket", "빨간 사과", "고양이 얼굴", "노란 별",
    ),
    "shapes": (
        "a small red circle left of a large blue square", "a large green triangle",
        "a yellow square above a red circle", "빨간 원", "파란 사각형", "초록 별",
    ),
}  # fmt: skip
CPU = "--device cpu --dtype float32"
SAMPLE = f"sample --prompts {{prompts}} -n 4 -m {{model}} --seed 0 {CPU} -o {{out}}"
VARIANTS = {  # of SAMPLE, for both bundles; a second -n wins
    "default": "",
    "unguided": "--guidance 1",
    "guided": "--guidance 2",
    "inpainted": "-n 2 --image {image} --keep-rows 6 --guidance 2",
}
MORE_VARIANTS = {  # for shapes, which is faster
    "filtered": "--temperature 0.8 --top-k 20 --top-p 0.9",
    "partly-guided": "--guidance 3 --guidance-from 0.25 --guidance-to 0.75 --temperature 0",
    "int8": "--int8",
}
DECODE = f"decode {{latents}} -m {{model}} {CPU} -o {{out}}"
RERANK = f"rerank {{images}} -m {{model}} {CPU} -o {{out}}"
RERANK_BY = {
    "emoji": {"clip": ""},
    "shapes": {"clip": "", "prior": "--by prior --codes {codes}", "contrast": "--by contrast"},
}
GENERATE = f"generate --prompts {{prompts}} -n 2 -m {{model}} --seed 3 {CPU} -o {{out}}.png --images {{out}}"
CODES, IMAGES, EMBEDDINGS, SCORE, IDS, TOKENS = "codes", "images", "embeddings", "score", "ids", "tokens"
LOG, LOG_MACHINE = "metrics.jsonl", ("seconds", "rate", "peak_memory")

TRAIN = (
    "steps = 20, batch_size = 4, lr = 1e-2, warmup = 2, ema = 0.5, ema_every = 1, log_every = 5, validate_every = 10, "
    "checkpoint_every = 10, validation = 0.2"
)
UNET = (
    "width = 8, multipliers = [1, 2], depth = 1, head_width = 4, groups = 4, dropout = 0.1, n_timestep = 40, "
    "prediction = 'epsilon'"
)
TOWER = "n_layer = 2, n_head = 2, n_embd = 16"
CLIP_TOWERS = ", ".join(f"{side}_width = 16, {side}_layers = 1, {side}_heads = 2" for side in ("vision", "text"))
TEXT = "context_width = 8, text_layers = 1, text_heads = 2"
PAINTER = f"{TRAIN}, grid_images = 0"
RECIPE = f"""
tokenizer = {{vocab_size = 300, length = 16}}
dvae = {{image_size = 16, n_groups = 3, n_hid = 8, n_blk_per_group = 1, n_init = 8, n_vocab = 20, train = {{{TRAIN}}}}}
clip = {{image_size = 16, patch_size = 8, n_proj = 16, n_text = 16, {CLIP_TOWERS}, train = {{{TRAIN}}}}}
decoder = {{image_size = 8, attention = [4], {TEXT}, {UNET}, train = {{{PAINTER}}}}}
upsampler_1 = {{image_size = 16, low_size = 8, low_noise = 0.5, {UNET}, train = {{{PAINTER}, crop = 2}}}}
upsampler_2 = {{image_size = 32, low_size = 16, {UNET}, train = {{{PAINTER}, corruption = "bsr"}}}}
prior = {{{TOWER}, conv_kernel = 3, train = {{{TRAIN}, grid_prompts = 0, bpe_dropout = 0.1, caption_dropout = 0.1}}}}
[embedding_prior]
diffusion = {{{TOWER}, n_timestep = 50, train = {{{TRAIN}}}}}
autoregressive = {{{TOWER}, n_bucket = 16, n_dot = 4, n_component = 8, train = {{{TRAIN}}}}}
"""
INPUTS = {  # of training: name -> command
    "tokenizer": "train-tokenizer {data} --config {recipe} -o {out}",
    "tokens": "tokenize {data} -t {tokenizer} --config {recipe} -o {out}",
    "captions": "tokenize {data} -t {shapes}/tokenizer.json -m {shapes}/clip.safetensors --config {recipe} -o {out}",
    "codes": f"encode-images {{data}} -m {{shapes}}/dvae.safetensors {CPU} -o {{out}}",
    "embeddings": f"encode-images {{data}} -m {{shapes}}/clip.safetensors {CPU} -o {{out}}",
}
PRIOR = "train-prior {captions} {codes} -t {shapes}/tokenizer.json"
EMBEDDING_PRIOR = "train-prior {captions} {embeddings} --set embedding_prior.kind="
OF_TRAINING = f"--config {{recipe}} --seed 0 {CPU} -o {{out}}"
STILL = {"steps = 20": "steps = 1", "lr = 1e-2": "lr = 0", "'epsilon'": "'v'"}  # changes, for weights as they start
TRAINERS = {
    "dvae": "train-dvae {data}",
    "dvae-fsq": "train-dvae {data} --set dvae.quantizer=fsq --set dvae.fsq_levels=[5,4] --set dvae.block=residual"
    " --set dvae.likelihood=l1",
    "clip": "train-clip {data} -t {tokenizer}",
    "prior": PRIOR,
    "prior-modern": f"{PRIOR} --set prior.block=modern --set prior.attention=full --set prior.dropout=0.1"
    " --set prior.train.optimizer=muon --set prior.train.schedule=trapezoid --set prior.train.code_noise=0.1",
    "prior-sketch": f"{PRIOR} --set prior.sketch=4 --set prior.sketch_width=8 --set prior.train.sketch_batch=4",
    "diffusion": f"{EMBEDDING_PRIOR}diffusion",
    "autoregressive": f"{EMBEDDING_PRIOR}autoregressive",
    "decoder": "train-decoder {data} {embeddings} --captions {captions}",
    "upsampler-1": "train-decoder {data} --upsampler 1",
    "upsampler-2": "train-decoder {data} --upsampler 2",
}
UNCLIP = ("decoder", "upsampler-1", "upsampler-2")  # beside a prior
EMBEDDED = {  # of SAMPLE
    "diffusion": {name: f"--sampler {name} --steps 4 --guidance 8 -n 2" for name in ("ddpm", "ddim", "dpm++", "heun")},
    "autoregressive": {"likely": "--temperature 0.9 --top-k 12 --top-p 0.9 --guidance 2 -n 2", "plain": "-n 2"},
}
PAINTED = {  # of DECODE
    "ddpm": "--decoder-sampler ddpm --decoder-steps 4 --decoder-guidance 3 --upsampler-steps 2",
    "ddim": "--decoder-sampler ddim --eta 0.5 --decoder-steps 4 --decoder-guidance 3 --upsampler-steps 2",
    "dpm++": "--decoder-sampler dpm++ --decoder-steps 4 --decoder-guidance 1 --upsampler-steps 2 --seed 1",
    "heun": "--decoder-sampler heun --decoder-steps 3 --decoder-guidance 2 --upsampler-steps 2",
}
EDIT = f"--decoder-steps 6 --upsampler-steps 2 --seed 2 -m {{model}} {CPU} -o {{out}}.png --images {{out}}"
EDITED = {
    "vary": "vary {image} -n 2 --eta 0.5",
    "interpolate": "interpolate {image} {other} --steps 6",
    "diff": "diff {image} red blue --steps 6",
    "reconstruct": "reconstruct {image} --components 2,8",
}
INFO = "info {path} --json"
INFO_TENSORS, INFO_DTYPE, INFO_SHAPE = "tensors", "dtype", "shape"
INFO_OF = (  # one or more of each kind
    "inputs/captions", "inputs/codes", "inputs/embeddings", "trained/dvae", "trained/clip", "trained/prior",
    "trained/prior-sketch", "trained/diffusion", "trained/autoregressive", "trained/decoder", "trained/upsampler-1",
    "trained/prior.run/checkpoint-00000020", "unclip/diffusion-ddpm", "unclip/ranked", "shapes/default-codes",
    "shapes/clip",
)  # fmt: skip

# Where things are

GOLDEN = Path(__file__).parent / "golden"
BUNDLES = Path(dalle_cli.__file__).parent / "bundles"  # by path: tests hide what is shipped
SHARE = 0.8  # of the rows, which must agree on another machine
TOLERANCE = 0.02  # of floats, likewise


def digest(*parts):
    """SHA-256 of bytes and texts, one after another."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else str(part).encode())
    return whole.hexdigest()


def fingerprint():
    """What decides the last bits of results: versions, vector instructions, and the bits of reference products."""
    x = (torch.arange(96 * 96) * 7919 % 1009).float().reshape(96, 96) / 1009 - 0.5
    image, kernel = x.reshape(1, 4, 48, 48), x[:36, :4].reshape(4, 4, 3, 3)
    made = [x @ x, x[:5, :33] @ x[:33, :7], torch.conv2d(image, kernel, padding=1), x.exp(), x.softmax(1), x.tanh()]
    made += [torch.erf(x), torch.sin(9 * x), torch.rsqrt(1 + x), torch.layer_norm(x, [96]), x.sum(), x.cumsum(1)]
    bits = digest(*(part.numpy().tobytes() for part in made))[:16]
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, numpy {np.__version__}, pillow {Image.__version__}, {cpu}, {bits}"


def entry(array, relative=False):
    """The hash of an array, and numbers of its rows that are alike on any machine."""
    array = np.ascontiguousarray(array)
    rows = array.reshape(len(array), -1)
    found = {"sha256": digest(array.dtype.str, array.shape, array.tobytes())}
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        return {**found, "rows": [digest(row.tobytes())[:6] for row in rows]}
    probe = np.cos(1 + np.arange(rows.shape[1]) ** 2.0) / rows.shape[1] ** 0.5
    numbers = [float(f"{number:.5g}") for number in rows.astype(np.float64) @ probe]
    return {**found, "numbers": numbers, "scale": 0 if relative else float(f"{array.std():.3g}")}


def weights_entry(path):
    """Of weights: two hashes, with the tensors' names and without, and their norm."""
    tensors = load_file(path)
    parts = {name: digest(x.dtype.str, x.shape, x.tobytes()) for name, x in tensors.items()}
    norm = sum((x.astype(np.float64) ** 2).sum() for x in tensors.values()) ** 0.5
    return {
        "sha256": digest(*sorted(parts.values())),
        "names": digest(*(f"{name} {part}\n" for name, part in sorted(parts.items()))),
        "numbers": [float(f"{norm:.5g}")],
        "scale": 0,
    }


def log_entry(path):
    """Of a run's log: the numbers of each row, whatever they are called."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    numbers = []
    for row in rows:
        flat = {**row, **row.get("validation", {})}
        kept = (v for k, v in flat.items() if k not in LOG_MACHINE and isinstance(v, int | float))
        numbers += sorted(float(f"{v:.6g}") for v in kept)
    return entry(np.array(numbers), relative=True)


def rank_entries(name, path):
    """Of ranked images: who is first, second, ... and their scores to 4 digits, by id."""
    tensors = load_file(path)
    text, ends = tensors[f"{IDS}.bytes"].tobytes().decode(), tensors[f"{IDS}.offsets"].tolist()
    order = np.argsort([text[start:end] for start, end in itertools.pairwise(ends)], kind="stable")
    places = np.argsort(order, kind="stable")
    return {f"{name}/order": entry(places), f"{name}/scores": entry(np.round(tensors[SCORE][order], 4))}


def run(command, **places):
    """A command of the table, with its places filled in."""
    return run_ok(*(word.format(**places) for word in command.split()))


def write_data(folder):
    """20 images of 32 x 32 with captions: a colored bar on a background, its length and place by its number."""
    folder.mkdir()
    colors = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 70, 220), "yellow": (240, 210, 40)}
    for i, ((name, color), side) in enumerate(itertools.product(colors.items(), range(5))):
        image = np.full((32, 32, 3), 255 if i % 2 else 0, np.uint8)
        image[4 + 3 * side : 20 + side, 3 : 12 + 4 * side] = color
        Image.fromarray(image).save(folder / f"{i:02d}.png")
        ground = "white" if i % 2 else "black"
        (folder / f"{i:02d}.txt").write_text(f"a {'small' if side < 2 else 'large'} {name} square on {ground}")
    return folder


class Golden:
    """All results, each group made when it is first asked for, under one folder."""

    def __init__(self, root):
        torch.set_num_threads(1)
        self.root = root
        self.places = {"shapes": BUNDLES / "shapes", "data": write_data(root / "data"), "recipe": root / "recipe.toml"}
        self.places["recipe"].write_text(RECIPE)
        (root / "still.toml").write_text(re.sub("|".join(STILL), lambda found: STILL[found[0]], RECIPE))

    def make(self, name, command, **places):
        """Run a command that writes `name`.safetensors, and remember where that is."""
        out = self.root / (name if "." in name else f"{name}.safetensors")
        out.parent.mkdir(parents=True, exist_ok=True)
        run(command, out=out, **{**self.places, **places})
        return out

    def bundle(self, name):
        """Codes, images and ranks by a shipped bundle."""
        model, found = BUNDLES / name, {}
        prompts, image = self.root / f"{name}.txt", self.places["data"] / "13.png"
        prompts.write_text("\n".join(PROMPTS[name]))
        variants = {**VARIANTS, **(MORE_VARIANTS if name == "shapes" else {})}
        for variant, more in variants.items():
            stem = f"{name}/{variant}"
            codes = self.make(f"{stem}-codes", f"{SAMPLE} {more}", model=model, prompts=prompts, image=image)
            found[f"{variant}/codes"] = entry(load_file(codes)[CODES])
        images = self.make(
            f"{name}/images", DECODE, latents=self.root / f"{name}/default-codes.safetensors", model=model
        )
        found["default/images"] = entry(load_file(images)[IMAGES])
        for by, more in RERANK_BY[name].items():
            codes = self.root / f"{name}/default-codes.safetensors"
            ranked = self.make(f"{name}/{by}", f"{RERANK} {more}", images=images, model=model, codes=codes)
            found |= rank_entries(f"rerank/{by}", ranked)
        made = load_file(self.make(f"{name}/generated", f"{GENERATE} -n 2", model=model, prompts=prompts))
        return {**found, "generate": entry(made[IMAGES])}

    @cached_property
    def emoji(self):
        return self.bundle("emoji")

    @cached_property
    def shapes(self):
        return self.bundle("shapes")

    @cached_property
    def inputs(self):
        """What trainers read."""
        shutil.copytree(self.places["shapes"], self.root / "inputs")  # a sketch asks for the dVAE beside its codes
        for name, command in INPUTS.items():
            out = f"inputs/{name}" if name != "tokenizer" else "own-tokenizer.json"
            self.places[name] = self.make(out, command)
        return {
            "tokens": entry(load_file(self.places["tokens"])[TOKENS]),
            "captions": entry(load_file(self.places["captions"])[TOKENS]),
            "text-embeddings": entry(load_file(self.places["captions"])[EMBEDDINGS]),
            "codes": entry(load_file(self.places["codes"])[CODES]),
            "embeddings": entry(load_file(self.places["embeddings"])[EMBEDDINGS]),
        }

    @cached_property
    def trained(self):
        """Weights and losses of each trainer after 20 updates."""
        assert self.inputs
        found = {}
        for name, command in TRAINERS.items():
            out = self.make(f"trained/{name}", f"{command} {OF_TRAINING}")
            found[name] = weights_entry(out)
            found[f"{name}/log"] = log_entry(out.with_suffix(".run") / LOG)
        return found

    @cache  # noqa: B019
    def random(self, name):
        """Weights of a trainer's start and noise where training moves them, alike on any machine to rounding."""
        start = self.make(f"start/{name}", f"{TRAINERS[name]} {OF_TRAINING}", recipe=self.root / "still.toml")
        trained, tensors = load_file(self.root / "trained" / start.name), load_file(start)
        with safe_open(start, "np") as file:
            metadata = file.metadata()
        for key, x in tensors.items():
            if np.abs(trained[key] - x).max() > 1e-4:  # a parameter, no buffer
                noise = np.random.default_rng(x.shape).normal(scale=0.1, size=x.shape)
                tensors[key] = x + (noise * (3 / x[0].size ** 0.5 if x.ndim > 1 else 1)).astype(x.dtype)
        out = self.root / "random" / start.name
        out.parent.mkdir(exist_ok=True)
        save_file(tensors, out, metadata)
        return out

    @cached_property
    def unclip(self):
        """Embeddings, images and ranks by random weights, with both kinds of prior."""
        assert self.trained
        found, prompts = {}, self.root / "unclip.txt"
        prompts.write_text("a small red square on black\na large blue square on white")
        for kind, samplers in EMBEDDED.items():
            model = self.root / "unclip" / kind
            model.mkdir(parents=True)
            for path in (kind, *UNCLIP):
                shutil.copy(self.random(path), model)
            for path in ("clip.safetensors", "tokenizer.json"):
                shutil.copy(self.places["shapes"] / path, model)
            for name, more in samplers.items():
                stem = f"unclip/{kind}-{name}"
                drawn = self.make(stem, f"{SAMPLE} {more}", model=model, prompts=prompts)
                found[f"{kind}/{name}/embeddings"] = entry(load_file(drawn)[EMBEDDINGS])
            made = load_file(self.make(f"unclip/{kind}-generated", f"{GENERATE} {more}", model=model, prompts=prompts))
            found[f"{kind}/generate"] = entry(made[IMAGES])
        for name, more in PAINTED.items():
            images = self.make(f"unclip/painted-{name}", f"{DECODE} {more}", latents=drawn, model=model)
            found[f"decoder/{name}/images"] = entry(load_file(images)[IMAGES])
        ranked = self.make("unclip/ranked", RERANK, images=images, model=model)
        return {**found, **rank_entries("rerank", ranked)}

    @cached_property
    def edited(self):
        """Images painted from those of an image."""
        assert self.unclip
        model, image, other = (
            self.root / "unclip" / "diffusion",
            *(self.places["data"] / f"{n}.png" for n in ("13", "06")),
        )
        found = {}
        for name, command in EDITED.items():
            out = self.make(f"edited/{name}", f"{command} {EDIT}", model=model, image=image, other=other)
            found[name] = entry(load_file(out)[IMAGES])
        return found

    @cached_property
    def info(self):
        """What `info --json` says, with digests numbered and long lists of tensors as a hash."""
        assert self.unclip
        assert self.shapes
        found, seen = {}, {}
        for name in INFO_OF:
            text = run(INFO, path=self.root / f"{name}.safetensors").replace(f"{self.root}/", "")
            text = re.sub(r"\b[0-9a-f]{64}\b", lambda found: f"digest {seen.setdefault(found[0], len(seen))}", text)
            told = found[name] = json.loads(text)
            tensors = [f"{k}: {v[INFO_DTYPE]} {v[INFO_SHAPE]}" for k, v in sorted(told[INFO_TENSORS].items())]
            told[INFO_TENSORS] = tensors if len(tensors) < 12 else f"{len(tensors)}, {digest(*tensors)[:12]}"
        return found


# Comparing

GROUPS = ("inputs", "trained", "unclip", "edited", "shapes", "emoji")


def changes(found, recorded, same_machine):
    """What differs: entry -> how."""
    out = {name: "not there" if name in recorded else "new" for name in found.keys() ^ recorded.keys()}
    for name in found.keys() & recorded.keys():
        new, old = found[name], recorded[name]
        if not alike(new, old, same_machine):
            out[name] = f"other results\n    found    {new}\n    recorded {old}"
        elif new.get("names") != old.get("names") and same_machine:
            out[name] = "the same tensors by other names"
    return out


def alike(new, old, same_machine):
    """Whether two entries are equal; on another machine than the recorded, whether they are close."""
    if same_machine:
        return new["sha256"] == old["sha256"]
    if "rows" in old:
        equal = [a == b for a, b in zip(new["rows"], old["rows"], strict=False)]
    else:
        atol = TOLERANCE * (old["scale"] or 0.05)
        pairs = zip(new["numbers"], old["numbers"], strict=False)
        equal = [np.isclose(a, b, rtol=TOLERANCE, atol=atol) for a, b in pairs]
    lengths = {len(x.get("rows", x.get("numbers"))) for x in (new, old)}
    return len(lengths) == 1 and bool(np.mean(equal) >= SHARE)


def read():
    """The recorded machine and entries."""
    recorded = json.loads((GOLDEN / "golden.json").read_text())
    return recorded["machine"], recorded["entries"]


def read_info():
    """The recorded texts of `info --json`."""
    return json.loads((GOLDEN / "info.json").read_text())


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    before = torch.get_num_threads()
    yield Golden(tmp_path_factory.mktemp("golden"))
    torch.set_num_threads(before)


@pytest.mark.parametrize("group", GROUPS)
def test_results_are_those_recorded(golden, group):
    machine, entries = read()
    found = changes(getattr(golden, group), entries[group], machine == fingerprint())
    assert not found, "\n".join(f"{name}: {how}" for name, how in sorted(found.items()))


def test_info_says_what_is_recorded(golden):
    """On any machine: it holds no float result."""
    recorded = read_info()
    assert golden.info.keys() == recorded.keys()
    for name, told in golden.info.items():
        assert told == recorded[name], name


def test_other_results_are_seen():
    """On the recorded machine to the last bit, on another beyond rounding; and whether only names differ."""
    rng = np.random.default_rng(0)
    floats, codes = rng.normal(size=(16, 50)), rng.integers(0, 64, (16, 50)).astype(np.uint16)
    near, far, rare = floats + 1e-5, rng.normal(size=(16, 50)), codes.copy()
    rare[3, 7] ^= 1
    for old, close, other in ((floats, near, far), (codes, rare, codes[::-1]), (floats, floats, floats[:9])):
        assert alike(entry(old), entry(old), True)
        assert alike(entry(close), entry(old), False)
        assert not alike(entry(other), entry(old), True)
        assert not alike(entry(other), entry(old), False)
    assert not alike(entry(near), entry(floats), True)
    assert not alike(entry(rare), entry(codes), True)
    renamed = {"w": {**entry(floats), "names": "b"}}
    assert changes(renamed, {"w": {**entry(floats), "names": "a"}}, True)["w"].startswith("the same tensors")
    assert changes({"a": 1}, {"b": 1}, True) == {"a": "new", "b": "not there"}
