"""The emoji recipe: joining, compositing, dropping, splitting, on small packages made here; and the shipped pairs."""

import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "recipes" / "emoji"
sys.path.insert(0, str(FOLDER))  # prepare.py imports the file beside it
spec = importlib.util.spec_from_file_location("emoji_prepare", FOLDER / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
sys.modules["emoji_prepare"] = prepare
spec.loader.exec_module(prepare)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def plain(value, size=64):
    """An opaque image whose color tells it from others."""
    return png(Image.new("RGBA", (size, size), (value, 255 - value, 7, 255)))


def pack(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


ENTRIES = [
    {"label": "dog", "hexcode": "1F415", "tags": ["animal", "dogs", "pet"], "group": 3, "subgroup": 34},
    {"label": "eye in speech bubble", "hexcode": "1F441-FE0F-200D-1F5E8-FE0F", "group": 0, "subgroup": 10},
    {"label": "copyright", "hexcode": "00A9", "group": 8, "subgroup": 10},
    {"label": "family: man, boy", "hexcode": "1F468-200D-1F466", "group": 1, "subgroup": 10},
    {"label": "cat face", "hexcode": "1F431", "group": 3, "subgroup": 34},
    {"label": "grinning cat", "hexcode": "1F63A", "group": 0, "subgroup": 10},
    {"label": "flag: Bouvet Island", "hexcode": "1F1E7-1F1FB", "group": 9, "subgroup": 10},
    {"label": "flag: Norway", "hexcode": "1F1F3-1F1F4", "group": 9, "subgroup": 10},
    {
        "label": "snowboarder",
        "hexcode": "1F3C2",
        "group": 1,
        "subgroup": 10,
        "skins": [{"label": "snowboarder: dark skin tone", "hexcode": "1F3C2-1F3FF"}],
    },
]
MESSAGES = {
    "groups": [
        {"order": 0, "key": "smileys-emotion"},
        {"order": 1, "key": "people-body"},
        {"order": 3, "key": "animals-nature"},
        {"order": 8, "key": "symbols"},
        {"order": 9, "key": "flags"},
    ],
    "subgroups": [{"order": 34, "key": "animal-mammal"}, {"order": 10, "key": "other-symbol"}],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of packages as `npm pack` leaves them, with one of each difficulty."""
    folder = tmp_path_factory.mktemp("npm")
    korean = [
        entry | {"label": {"1F415": "개", "1F1F3-1F1F4": "깃발: 노르웨이"}.get(entry["hexcode"], "것")}
        for entry in ENTRIES
    ]
    pack(
        folder / "emojibase-data-17.0.0.tgz",
        {
            "package/en/data.json": json.dumps(ENTRIES).encode(),
            "package/ko/data.json": json.dumps(korean).encode(),
            "package/en/messages.json": json.dumps(MESSAGES).encode(),
        },
    )
    noto = {
        "1f415": png(Image.new("LA", (64, 64), (0, 0))),
        "1f441-fe0f-200d-1f5e8-fe0f": plain(20),
        "1f468-200d-1f466": plain(30),
        "1f1e7-1f1fb": plain(40),
        "1f1f3-1f1f4": plain(40),
        "1f3c2": plain(50),
        "1f3c2-1f3ff": plain(50),
        "1f63a": plain(60),
        "ffff": plain(70),
    }
    twemoji = {"1f415": png(Image.new("RGBA", (64, 64), (255, 0, 0, 128)).quantize(4)), "1f431": plain(90)}
    fluent = {"1f415": plain(100, 256), "1f63a": plain(110, 256), "a9-fe0f": plain(120, 256), "1f431": plain(110, 256)}
    for style, files in (("noto", noto), ("twemoji", twemoji)):
        source = "google" if style == "noto" else "twitter"
        members = {f"package/img/{source}/64/{stem}.png": data for stem, data in files.items()}
        pack(folder / f"emoji-datasource-{source}-16.0.0.tgz", members | {f"package/img/{source}/sheets/64.png": b"x"})
    body = '<circle cx="8" cy="8" r="8" fill="#00f"/>'
    for package, names in {
        "fluent-emoji-flat-1.2.6": ("dog", "cat-face", "snowboarder", "snowboarder-dark-skin-tone", "no-emoji"),
        "noto-v1-1.2.5": ("flag-norway", "dog"),
        "emojione-1.2.3": ("grinning-cat", "dog", "family-man-boy"),
    }.items():
        icons = {name: {"body": body.replace("8", str(3 + i), 1)} for i, name in enumerate(names)}
        aliases = {"copyright": {"parent": "dog"}, "cat-face": {"parent": "dog", "hFlip": True}}
        table = {"icons": icons, "width": 16, "height": 16, "aliases": aliases if "emojione" in package else {}}
        pack(folder / f"iconify-json-{package}.tgz", {"package/icons.json": json.dumps(table).encode()})
    pack(folder / "lobehub-fluent-emoji-3d-1.1.0.tgz", {f"package/assets/{s}.webp": d for s, d in fluent.items()})
    return folder


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(FOLDER / "prepare.py"), *map(str, arguments)], capture_output=True, text=True
    )


def pairs(path):
    """Every pair of a tar: key -> (image, JSON)."""
    with tarfile.open(path) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    keys = sorted({name.rsplit(".", 1)[0] for name in files})
    assert sorted(files) == sorted(key + suffix for key in keys for suffix in (".json", ".png"))
    return {k: (Image.open(io.BytesIO(files[k + ".png"])), json.loads(files[k + ".json"])) for k in keys}


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory):
    """All pairs that prepare.py makes of the packages, by the name of the tar."""
    out = tmp_path_factory.mktemp("out")
    done = run(cache, out, "--language", "en", "ko")
    assert done.returncode == 0, done.stderr
    return {name: pairs(out / f"{name}.tar") for name in ("train", "test", "more")}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("1F415", "1f415"),
        ("1f441-fe0f-200d-1f5e8-fe0f", "1f441-200d-1f5e8"),
        ("0023-FE0F-20E3", "0023-20e3"),
        ("23-20e3", "0023-20e3"),
        ("26A7-FE0E", "26a7"),
    ],
)
def test_codes_join_whatever_their_case_padding_and_selectors(name, code):
    assert prepare.code_of(name) == code


def test_pairs_are_joined_and_the_right_ones_dropped(made):
    assert sorted(made["train"] | made["test"]) == [
        "fluent-1f415",
        "fluent-1f431",
        "fluent-a9-fe0f",
        "noto-1f1f3-1f1f4",
        "noto-1f3c2",
        "noto-1f415",
        "noto-1f441-fe0f-200d-1f5e8-fe0f",
        "noto-1f63a",
        "twemoji-1f415",
        "twemoji-1f431",
    ]


def test_every_mode_is_composited_on_white_at_64_pixels(made):
    every = made["train"] | made["test"]
    assert {(image.mode, image.size, image.format) for image, _ in every.values()} == {("RGB", (64, 64), "PNG")}
    assert np.asarray(every["noto-1f415"][0]).min() == 255  # LA: transparent black
    half = np.asarray(every["twemoji-1f415"][0], int)  # P with half transparent red
    assert abs(half - [255, 127, 127]).max() <= 2
    assert every["noto-1f63a"][0].getpixel((3, 3)) == (60, 195, 7)


def test_pictures_that_are_not_square_are_padded_not_stretched():
    image = prepare.on_white(Image.new("RGBA", (256, 264), (9, 9, 9, 255)))
    assert image.size == (264, 264)
    assert [image.getpixel((x, 100)) for x in (3, 4, 259, 260)] == [(255,) * 3, (9,) * 3, (9,) * 3, (255,) * 3]


def test_captions_name_label_style_and_tags_in_both_languages(made):
    _, row = (made["train"] | made["test"])["noto-1f415"]
    assert row["caption"] == [
        "a noto style emoji of a dog",
        "dog, noto",
        "noto emoji of a dog",
        "dog, animal, pet, noto",
        "a dog",
        "노토 스타일의 개 이모지",
        "개, 노토",
        "개 이모지, 노토 스타일",
        "개",
    ]
    assert {key: row[key] for key in ("label", "style", "code", "base", "group")} == {
        "label": "dog",
        "style": "noto",
        "code": "1f415",
        "base": "1f415",
        "group": "animals-nature",
    }
    _, flag = (made["train"] | made["test"])["noto-1f1f3-1f1f4"]
    assert "flag of Norway, noto" in flag["caption"]
    assert "노르웨이 깃발, 노토" in flag["caption"]


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("man: light skin tone, blond hair", "man with light skin tone and blond hair"),
        ("woman: bald", "bald woman"),
        ("kiss: woman, man, dark skin tone", "kiss of woman and man with dark skin tone"),
        ("person walking: facing right", "person walking facing right"),
        ("keycap: 3", "keycap 3"),
        ("fox", "fox"),
    ],
)
def test_labels_become_phrases(label, phrase):
    assert prepare.said(label) == phrase


@pytest.mark.parametrize(
    ("phrase", "article"),
    [("owl", "an owl"), ("unicorn", "a unicorn"), ("scissors", "scissors"), ("bus", "a bus"), ("T-Rex", "T-Rex")],
)
def test_articles(phrase, article):
    assert prepare.with_article(phrase, "objects") == article


# Hashes by `printf 1f34e | sha256sum` and bc: % 20, and (// 20) % 3, counted fluent, noto, twemoji.
BY_HAND = {
    "1f34e": ("train", "train", "withheld-style"),  # 3, 2
    "1f427": ("train", "withheld-style", "train"),  # 3, 1
    "1f355": ("withheld-style", "train", "train"),  # 1, 0
    "1f40d": ("withheld-concept", "withheld-concept", "withheld-concept"),  # 0, 1
    "1f9a9": ("train", "train", "train"),  # 4, 1
    "1f415": ("train", "train", "train"),  # 18, 1
}


@pytest.mark.parametrize(("code", "splits"), BY_HAND.items())
def test_split_follows_the_hash_of_the_concept(code, splits):
    assert tuple(prepare.split(style, code) for style in ("fluent", "noto", "twemoji")) == splits
    assert prepare.split("noto", code + "-1f3fd") == splits[1]  # a skin tone goes where its concept goes


def test_split_shares_are_those_of_the_rule():
    codes = [f"{number:x}" for number in range(0x1F300, 0x1F300 + 3000)]
    table = [tuple(prepare.split(style, code) for style in prepare.STYLES) for code in codes]
    whole = sum(row == ("withheld-concept",) * 3 for row in table) / len(table)
    once = sum(row.count("withheld-style") == 1 and row.count("train") == 2 for row in table) / len(table)
    assert whole == pytest.approx(1 / 20, abs=0.012)
    assert once == pytest.approx(3 / 20, abs=0.02)
    assert sum(row == ("train",) * 3 for row in table) / len(table) == pytest.approx(1 - whole - once)


def test_nothing_withheld_is_in_the_training_tar(made):
    assert all(row["split"] == "train" for _, row in made["train"].values())
    assert all(row["split"].startswith("withheld-") for _, row in made["test"].values())
    for _, row in (made["train"] | made["test"]).values():
        number = int(hashlib.sha256(row["base"].encode()).hexdigest(), 16)
        in_style = number % 20 in (1, 2, 3) and ["fluent", "noto", "twemoji"][number // 20 % 3] == row["style"]
        assert (row["split"] == "train") == (number % 20 != 0 and not in_style)


@pytest.mark.parametrize(("style", "akin"), [("flat", "fluent"), ("blob", "noto"), ("emojione", None)])
def test_further_styles_have_nothing_that_is_withheld_in_the_style_they_are_akin_to(tmp_path, style, akin):
    codes = [f"{number:04x}" for number in range(300)]
    labels = {code: prepare.Emoji(f"thing {code}", (), "objects", "tool") for code in codes}
    icons = {f"thing-{code}": {"body": "<path/>"} for code in codes}
    package = prepare.vectors.PACKAGES[style]
    pack(prepare.archive_name(tmp_path, package), {"package/icons.json": json.dumps({"icons": icons}).encode()})
    found = {image.code for image in prepare.read_vectors(tmp_path, style, labels, 8)}
    expected = set()
    for code in codes:
        n = int(hashlib.sha256(code.encode()).hexdigest(), 16)
        kept_back = n % 20 == 0 or (n % 20 <= 3 and ["fluent", "noto", "twemoji"][n // 20 % 3] == akin)
        expected |= set() if kept_back else {code}
    assert found == expected
    assert len(expected) < 290


def test_further_styles_are_rendered_on_white_and_captioned(made):
    names = ["blob-1f1f3-1f1f4", "blob-1f415", "emojione-00a9", "emojione-1f63a"]  # 00a9 has its alias' image first
    names += ["flat-1f3c2", "flat-1f415", "flat-1f431"]  # no skin tone, no family, no mirrored alias
    assert sorted(made["more"]) == names
    image, row = made["more"]["emojione-00a9"]
    assert row["caption"][1] == "copyright, emojione"
    assert row["caption"][-2:] == ["것 이모지, 이모지원 스타일", "것"]
    pixels = np.asarray(image)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[0, 63] == 255).all()
    assert (pixels[32, 20] == (0, 0, 255)).all()


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("flag: Côte d’Ivoire", "flag-cote-divoire"),
        ("A button (blood type)", "a-button-blood-type"),
        ("piñata", "pinata"),
    ],
)
def test_labels_as_packages_write_them(label, name):
    assert prepare.vectors.slug(label) == name


def test_same_packages_same_bytes(cache, tmp_path):
    for name in ("a", "b"):
        assert run(cache, tmp_path / name, "--styles", "noto", "twemoji").returncode == 0
    for name in ("train.tar", "test.tar", "more.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_missing_package_is_one_line_that_says_what_to_do(tmp_path):
    done = run(tmp_path, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "npm pack" in done.stderr
    assert "emojibase-data@17.0.0" in done.stderr


def test_the_shipped_pairs_are_noto_and_train_only():
    found = pairs(FOLDER / "small.tar")
    assert len(found) == 600
    assert (FOLDER / "small.tar").stat().st_size < 3.5e6
    for key, (image, row) in found.items():
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert row["style"] == "noto"
        assert row["split"] == prepare.split("noto", row["code"]) == "train"
        assert key.startswith("noto-")
        assert len(row["caption"]) >= 4
        assert row["base"] == row["code"]
    assert len({image.tobytes() for image, _ in found.values()}) == 600
    assert {"dog", "pizza", "rocket"} <= {row["label"] for _, row in found.values()}


def test_the_notice_names_source_copyright_and_both_licences():
    notice = (FOLDER / "NOTICE").read_text("utf-8")
    for text in (
        "github.com/googlefonts/noto-emoji",
        "Copyright Google",
        "TERMS AND CONDITIONS FOR USE",
        "Miles Johnson",
    ):
        assert text in notice


@pytest.mark.parametrize("goal", ["all", "small"])
def test_the_prior_of_the_full_set_is_finished_on_pictures_as_they_are(tmp_path, goal):
    """And sketches, and follows what is sketched. The small one is trained once; no rule hides another."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tar").touch()
    done = subprocess.run(
        ["make", "-n", goal, f"OUT={tmp_path}", "DALLE=dalle"], cwd=FOLDER, capture_output=True, text=True, check=True
    )
    assert "overriding" not in done.stderr
    lines = done.stdout.replace("\\\n", "").replace(f"{tmp_path}/", "").splitlines()
    trained = [line.split() for line in lines if line.startswith("dalle train-prior")]
    encoded = {line.split(" -o ")[1]: line for line in lines if line.startswith("dalle encode-images")}
    assert [words[words.index("-o") + 1] for words in trained][-1] == "model/prior.safetensors"
    if goal == "small":
        assert len(trained) == len(encoded) == 1
        return
    written = [words[words.index("-o") + 1] for words in trained]
    assert [words[words.index("--init") + 1] for words in trained[1:]] == written[:-1]
    read = [words[3] for words in trained]
    assert read == ["codes.safetensors", *["still.safetensors"] * 4]
    assert ["--augment place" in encoded[name] for name in read[:2]] == [True, False]
    assert all("--exclude" in words for words in trained)
    for label, place in (
        ("prior.sketch=16", 2),
        ("prior.train.sketch_only=true", 3),
        ("prior.train.sketch_resampled=0.6", 4),
    ):
        assert [i for i, words in enumerate(trained) if label in words] == [place]
    assert len({words[words.index("--seed") + 1] for words in trained}) == 5
