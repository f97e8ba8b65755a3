"""Hyper-parameters: TOML and --set to dataclasses, with every key, type and contradiction named."""

from dataclasses import asdict, dataclass

import pytest

from dalle_cli import config
from dalle_cli.data.filters import Filters
from dalle_cli.data.tokenizer import TokenizerConfig
from dalle_cli.errors import DalleError
from dalle_cli.models.clip import CLIPConfig
from dalle_cli.models.dvae import DVAEConfig
from dalle_cli.models.prior import PriorConfig
from dalle_cli.training.clip import CLIPTrain
from dalle_cli.training.config import TrainConfig
from dalle_cli.training.dvae import DVAETrain
from dalle_cli.training.prior import PriorTrain

EVERY = (Filters, TokenizerConfig, CLIPConfig, DVAEConfig, PriorConfig, TrainConfig, CLIPTrain, DVAETrain, PriorTrain)


@dataclass(frozen=True)
class Model:
    width: int
    rate: float = 0.5
    name: str = "plain"
    flip: bool = False
    levels: tuple[int, ...] = (1, 2)
    most: int | None = None


@dataclass(frozen=True)
class Train:
    steps: int = 10


def fails(call, *arguments, **more):
    with pytest.raises(DalleError) as caught:
        call(*arguments, **more)
    assert str(caught.value).startswith("expected ")
    return str(caught.value)


def build(**values):
    return config.build(Model, {"width": 1, **values}, "prior")


def test_a_recipe_and_what_overrides_it(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[prior]\nwidth = 3\nname = "wide"\n[prior.train]\nsteps = 5\n[dvae]\nn_hid = 8\n')
    overrides = ("prior.width=4", "prior.train.steps = 7", "prior.levels=[3, 4]", "prior.rate=1", "clip.n_proj=2")
    table = config.read(path, overrides)
    assert table["dvae"] == {"n_hid": 8}
    assert table["clip"] == {"n_proj": 2}
    model, train = config.section(table, "prior", Model, train=Train)
    assert model == Model(width=4, name="wide", levels=(3, 4), rate=1.0)
    assert isinstance(model.rate, float)
    assert train == Train(7)
    assert config.section({}, "prior", Model, {"width": 2}, train=Train) == [Model(2), Train()]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("1e-3", 1e-3),
        ("true", True),
        ('"true"', "true"),
        ("fsq", "fsq"),
        ("[8, 5]", [8, 5]),
        ("", ""),
        ("a b", "a b"),
    ],
)
def test_values_of_overrides(text, value):
    assert config.read(None, [f"prior.x={text}"]) == {"prior": {"x": value}}


@pytest.mark.parametrize(
    ("values", "field"),
    [
        *(({"width": "3"}, "width"), ({"width": 3.0}, "width"), ({"width": True}, "width"), ({"rate": "fast"}, "rate")),
        *(({"rate": float("nan")}, "rate"), ({"rate": float("inf")}, "rate"), ({"rate": 10**400}, "rate")),
        *(({"flip": 1}, "flip"), ({"name": 3}, "name"), ({"levels": 3}, "levels"), ({"levels": [1, "2"]}, "levels")),
        *(({"most": "3"}, "most"), ({"width": None}, "width"), ({"width": {"a": 1}}, "width")),
    ],
    ids=str,
)
def test_values_of_another_type(values, field):
    assert f"prior.{field}" in fails(build, **values)


def test_an_unknown_key_names_the_nearest():
    assert "found 'prior.widht'; did you mean 'width'?" in fails(build, widht=3)
    assert "known are width, rate" in fails(build, zzzz=3)
    assert "did you mean 'train'?" in fails(
        config.section, {"prior": {"width": 1, "trian": {}}}, "prior", Model, train=Train
    )
    found = fails(config.section, {"prior": {"width": 1, "train": {"step": 1}}}, "prior", Model, train=Train)
    assert "found 'prior.train.step'; did you mean 'steps'?" in found
    assert "found 'pior'; did you mean 'prior'?" in fails(config.read, None, ["pior.width=3"])


def test_a_missing_key():
    assert "prior.width" in fails(config.section, {}, "prior", Model)


def test_what_the_inputs_contradict():
    table = {"prior": {"width": 3}}
    assert config.section(table, "prior", Model, {"width": 3}) == [Model(3)]
    assert "expected prior.width = 4, as the inputs have it, found 3" in fails(
        config.section, table, "prior", Model, {"width": 4}
    )


@pytest.mark.parametrize(
    "overrides",
    [["prior"], ["prior.width"], ["=3"], ["prior.width=1", "prior.width.x=2"], ["", "a"], ["other.x=1"]],
    ids=str,
)
def test_overrides_that_are_none(overrides):
    fails(config.read, None, overrides)


@pytest.mark.parametrize("table", [{"prior": 3}, {"prior": {"width": 1, "train": 3}}, {"prior": []}], ids=str)
def test_what_should_be_a_table(table):
    assert "expected a table [prior" in fails(config.section, table, "prior", Model, train=Train)


@pytest.mark.parametrize(
    "data", [b"[prior", b"prior = \xff", b"a = " + b"[" * 9000, b"[prior]\nx = 1\nx = 2\n"], ids=repr
)
def test_files_that_are_no_toml(tmp_path, data):
    path = tmp_path / "recipe.toml"
    path.write_bytes(data)
    assert "expected TOML" in fails(config.read, path)


def test_files_that_are_not_there(tmp_path):
    assert "No such file" in fails(config.read, tmp_path / "none.toml")
    assert "directory" in fails(config.read, tmp_path)


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_a_header_builds_its_config_again(cls):
    import json

    made = cls()
    assert config.build(cls, json.loads(json.dumps(asdict(made))), "model") == made


@pytest.mark.parametrize("cls", [CLIPConfig, DVAEConfig, PriorConfig], ids=lambda cls: cls.__name__)
def test_a_header_that_lies_about_sizes(cls):
    """Every number of a model set to 0 and below: a DalleError or a model's config, never another exception."""
    for name, value in asdict(cls()).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            for lie in (0, -1):
                try:
                    config.build(cls, {name: lie}, "model")
                except DalleError as error:
                    assert str(error).startswith("expected ")  # noqa: PT017
