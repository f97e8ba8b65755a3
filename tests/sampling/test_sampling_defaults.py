"""The table `sampling` of a header: what it may hold for each kind of weights."""

import json

import pytest

from dalle_cli.errors import DalleError
from dalle_cli.sampling.defaults import NAMES, RULES, check_sampling_defaults

RIGHT = {
    "steps": (1, 25), "sampler": ("ddpm", "heun"), "spacing": ("linspace", "leading+1"),
    "variance": ("learned_range", "fixed_small"), "clip": (0, 5), "guidance": (0, 8.5), "eta": (0, 1.0),
    "best_of": (2,), "low_noise": (0.25,), "temperature": (0, 1.5), "top_k": (0, 256), "top_p": (0.995, 1),
    "sketch_guidance": (1.5,),
}  # fmt: skip
WRONG = {
    "steps": (0, 2.0, True, "25"), "sampler": ("ddpm2", None, 1, ["ddpm"]), "spacing": ("even", {}),
    "variance": ("learned", False), "clip": (-1, None, float("nan")), "guidance": (-1, "much", None),
    "eta": (1.5,), "best_of": (0,), "low_noise": (-0.1,), "temperature": (-1,), "top_k": (-1, 2.5), "top_p": (1.1,),
    "sketch_guidance": ([],),
}  # fmt: skip


def test_each_name_has_a_rule_and_a_kind():
    assert RIGHT.keys() == WRONG.keys() == RULES.keys() == {name for names in NAMES.values() for name in names}


@pytest.mark.parametrize("kind", NAMES)
def test_right_and_wrong_values(kind):
    for name, values in RIGHT.items():
        for value in values:
            if name in NAMES[kind]:
                assert check_sampling_defaults(kind, {name: value}, "x") == {name: value}
            else:
                with pytest.raises(DalleError, match=f"in the table sampling of x, found '{name}'; make it again"):
                    check_sampling_defaults(kind, {name: value}, "x")
    for name in NAMES[kind]:
        for value in WRONG[name]:
            with pytest.raises(DalleError, match=rf"for sampling\.{name} in x, found .*; make it again") as error:
                check_sampling_defaults(kind, {name: value}, "x")
            assert "\n" not in str(error.value)


def test_numbers_are_floats_where_fractions_are_allowed():
    found = check_sampling_defaults("weights.prior.codes", {"guidance": 4, "top_k": 256}, "x")
    assert json.dumps(found) == '{"guidance": 4.0, "top_k": 256}'


def test_weights_that_are_not_sampled_have_none():
    assert check_sampling_defaults("weights.clip", {}, "x") == {}
    with pytest.raises(DalleError, match="expected nothing in the table sampling of x, found 'steps'"):
        check_sampling_defaults("weights.clip", {"steps": 5}, "x")
    with pytest.raises(DalleError, match=r"expected a table sampling in the header of x, found \[\]"):
        check_sampling_defaults("weights.decoder", [], "x")
