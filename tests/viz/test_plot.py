"""Curves of runs: which log a path leads to, what of it is drawn, and the picture."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run_bad, run_cli, run_ok
from PIL import Image

from dalle_cli.errors import DalleError
from dalle_cli.viz import charts, curves

pytest.importorskip("matplotlib")

PRIOR = [
    {"step": 10, "seconds": 1.5, "loss": 4.0, "image_nats": 5.0, "text_nats": 3.0, "lr": 1e-3, "rate": 7.0},
    {"step": 20, "seconds": 3.0, "loss": 2.0, "image_nats": 2.5, "text_nats": 1.5, "lr": 5e-4, "rate": 8.0},
    {"step": 20, "seconds": 3.5, "validation": {"image_nats": 2.75, "text_nats": 1.75}},
]


def write(folder, name="prior", rows=PRIOR, tail=""):
    """A run's log, as training writes it; the path of its weights, which need not be there."""
    log = folder / f"{name}.run" / "metrics.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder / f"{name}.safetensors"


def test_weights_their_folder_and_the_log_itself_lead_to_the_same(tmp_path):
    weights = write(tmp_path)
    folder = tmp_path / "prior.run"
    first = curves.read([weights])
    assert curves.read([folder]) == curves.read([folder / "metrics.jsonl"]) == first
    assert first[0].name == "prior"


def test_lines_hold_what_the_log_says(tmp_path):
    (run,) = curves.read([write(tmp_path)])
    assert run.training["image_nats"] == curves.Line([10, 20], [5.0, 2.5])
    assert run.validation == {"image_nats": curves.Line([20], [2.75]), "text_nats": curves.Line([20], [1.75])}
    (run,) = curves.read([write(tmp_path)], "seconds")
    assert run.training["loss"].x == [1.5, 3.0]
    assert run.validation["text_nats"].x == [3.5]


def test_a_validation_shares_the_panel_of_its_figure(tmp_path):
    rows = [
        {"step": 1, "psnr": 10.0, "perplexity": 2.0},
        {"step": 2, "psnr": 12.0, "perplexity": 3.0},
        {"step": 2, "validation": {"psnr_held_out": 11.0, "code_perplexity": 4.0}},
    ]
    (run,) = curves.read([write(tmp_path, rows=rows)])
    assert run.validation["psnr"].y == [11.0]
    assert run.validation["perplexity"].y == [4.0]
    assert curves.choose([run], ["psnr_held_out"]) == ["psnr"]


def test_the_names_say_what_is_not_the_same(tmp_path):
    small, wide = write(tmp_path / "a" / "small" / "model"), write(tmp_path / "a" / "wide" / "trial" / "model")
    other = write(tmp_path / "a" / "small" / "model", "other")
    names = [run.name for run in curves.read([small, wide])]
    assert names == ["small", "wide/trial"]
    assert [run.name for run in curves.read([small, other])] == ["prior", "other"]
    assert [run.name for run in curves.read([small, small])] == ["prior", "prior"]
    nested = write(tmp_path / "a" / "small" / "model" / "prior.run" / "deeper")
    assert len({run.name for run in curves.read([small, nested])}) == 2


def test_by_default_what_tells_something_in_a_fixed_order(tmp_path):
    rows = [
        {"step": s, "lr": s, "loss": 1 / s, "recon": 1 / s, "kl": 4.1, "codebook": 0.0, "new": s * s, "rate": s}
        for s in (1, 2, 3)
    ]
    runs = curves.read([write(tmp_path, rows=rows)])
    assert curves.choose(runs) == ["loss", "lr", "new"]  # recon is loss again; kl and codebook stand still
    assert curves.choose(runs, ["rate", "kl"]) == ["rate", "kl"]
    still = curves.read([write(tmp_path, "still", [{"step": s, "kl": 4.1} for s in (1, 2)])])
    assert curves.choose(still) == ["kl"]


def test_what_is_no_number_and_a_line_that_was_cut_are_left_out(tmp_path):
    rows = [
        *PRIOR,
        {"step": 30, "loss": float("nan"), "rate": 10**400, "image_nats": None, "text_nats": True, "note": "x"},
    ]
    weights = write(tmp_path, rows=rows, tail='{"step": 40, "lo')
    (run,) = curves.read([weights])
    assert run.training["loss"].x == [10, 20]
    assert run.training["image_nats"].x == [10, 20]
    assert "note" not in run.keys
    assert run_ok("plot", weights, "-o", tmp_path / "x.png")


def test_faults_are_told_in_a_line(tmp_path):
    weights = write(tmp_path)
    assert "none.run/metrics.jsonl" in run_bad("plot", tmp_path / "none.safetensors")
    assert "metrics.jsonl" in run_bad("plot", tmp_path)
    assert "image_nats" in run_bad("plot", weights, "--keys", "image_nat")
    assert ".svg" in run_bad("plot", weights, "-o", tmp_path / "x.jpg")
    (tmp_path / "notes.png").write_text("not a picture")
    assert "notes.png" in run_bad("plot", weights, "-o", tmp_path / "notes.png")
    assert (tmp_path / "notes.png").read_text() == "not a picture"
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(bytes(range(256)) * 10)
    assert "binary.jsonl" in run_bad("plot", binary)
    write(tmp_path, "timeless", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert "seconds" in run_bad("plot", tmp_path / "timeless.run", "--x", "seconds")
    for rows in ([], [{"step": 1, "seconds": 2.0}], [{"loss": 1.0}], [{"step": "x", "loss": 1.0}]):
        assert "metrics.jsonl" in run_bad("plot", write(tmp_path, "empty", rows=rows))
    many = write(tmp_path, "many", [{"step": s, **{f"f{i}": s * i for i in range(1, 40)}} for s in (1, 2)])
    assert "--keys" in run_bad("plot", many)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    real = importlib.import_module

    def absent(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(charts.importlib, "import_module", absent)
    assert "dalle-cli[plot]" in run_bad("plot", write(tmp_path))


def test_the_picture_is_named_after_the_first_run_and_replaced_only_if_it_is_one(tmp_path):
    weights = write(tmp_path)
    assert run_ok("plot", weights) == str(tmp_path / "prior.png")
    assert run_ok("plot", tmp_path / "prior.run") == str(tmp_path / "prior.png")
    assert run_ok("plot", stdin=f"{weights}\n") == str(tmp_path / "prior.png")
    assert Image.open(tmp_path / "prior.png").size[0] > 800
    result = run_cli("plot", weights, weights, "-o", tmp_path / "prior.png", "--title", "Two of them")
    assert "runs 2, metrics 4" in result.stderr


@pytest.mark.parametrize(("suffix", "head"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_same_chart_is_the_same_bytes(tmp_path, suffix, head):
    weights, out = write(tmp_path), tmp_path / f"a{suffix}"
    first = Path(run_ok("plot", weights, "-o", out)).read_bytes()
    assert first.startswith(head)
    assert Path(run_ok("plot", weights, "-o", out)).read_bytes() == first


def panels(picture):
    return {panel.get_title(loc="left"): panel for panel in picture.axes}


def test_training_is_thin_and_held_out_thick_with_points(tmp_path):
    runs = curves.read([write(tmp_path / "a"), write(tmp_path / "b")])
    picture = charts.draw(runs, ["image_nats", "loss"])
    drawn = panels(picture)
    assert list(drawn) == ["image loss", "loss"]
    assert drawn["image loss"].get_title(loc="right") == "nats per code"
    lines = drawn["image loss"].lines
    assert [len(line.get_xdata()) for line in lines] == [2, 2, 1, 1]
    assert lines[2].get_linewidth() > 1.5 * lines[0].get_linewidth()
    assert lines[0].get_marker() in ("", "None")
    assert lines[2].get_marker() == "o"
    assert lines[0].get_color() == lines[2].get_color() != lines[1].get_color()
    assert {text.get_text() for text in drawn["image loss"].texts} == {"2.75"}  # the last of the held-out
    told = [text.get_text() for text in picture.legends[0].get_texts()]
    assert told == ["a", "b", "training", "validation"]


def test_a_scale_is_logarithmic_where_it_helps(tmp_path):
    rows = [{"step": s, "loss": 10.0**-s, "image_nats": 5 - s, "lr": 10.0**-s, "kl": -s} for s in (1, 2, 3)]
    drawn = panels(charts.draw(curves.read([write(tmp_path, rows=rows)]), ["loss", "image_nats", "lr", "kl"]))
    scales = {name: panel.get_yscale() for name, panel in drawn.items()}
    assert scales == {"loss": "log", "image loss": "linear", "learning rate": "linear", "KL divergence": "linear"}


def test_seconds_are_written_in_the_unit_that_suits(tmp_path):
    rows = [{"step": s, "seconds": 3600.0 * s, "loss": 1 / s} for s in (1, 5, 10)]
    picture = charts.draw(curves.read([write(tmp_path, rows=rows)], "seconds"), ["loss"], "seconds")
    assert picture.axes[0].get_xlabel() == "hours"
    assert list(picture.axes[0].lines[0].get_xdata()) == [1, 5, 10]
    picture = charts.draw(curves.read([write(tmp_path, rows=rows)]), ["loss"])
    assert picture.axes[0].get_xlabel() == "updates"


def test_a_long_curve_is_drawn_as_means(tmp_path):
    rows = [{"step": s, "loss": 2.0 + (-1) ** s} for s in range(1, 10_001)]
    line = panels(charts.draw(curves.read([write(tmp_path, rows=rows)]), ["loss"]))["loss"].lines[0]
    assert len(line.get_ydata()) <= charts.MOST_STEPS
    np.testing.assert_allclose(line.get_ydata(), 2.0, atol=0.1)
    assert line.get_xdata()[-1] <= 10_000


def test_values_beside_a_panel_do_not_touch(tmp_path):
    runs = [
        write(tmp_path / str(i), rows=[{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1 + i / 1000}]) for i in range(5)
    ]
    panel = panels(charts.draw(curves.read(runs), ["loss"]))["loss"]
    heights = sorted(text.xy[1] for text in panel.texts)
    assert len(heights) == 5
    assert min(np.diff(heights)) >= charts.LINE - 1e-9
    assert heights[-1] <= 1


def test_many_runs_have_looks_of_their_own():
    looks = {tuple(charts._look(number).values()) for number in range(20)}
    assert len(looks) == 20


def test_a_real_run_is_drawn(chain, tmp_path):
    assert Image.open(run_ok("plot", chain.dvae, "-o", tmp_path / "chain.png")).size[0] > 500
    assert {"loss", "lr", "psnr"} <= set(curves.read([chain.dvae])[0].keys)


def test_a_figure_that_only_some_runs_have(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b", rows=[{"step": 1, "psnr": 3.0}, {"step": 5, "psnr": 4.0}])
    runs = curves.read([a, b])
    drawn = panels(charts.draw(runs, curves.choose(runs)))
    assert {"image loss", "reconstruction"} <= set(drawn)
    assert len(drawn["reconstruction"].lines) == 1
    with pytest.raises(DalleError, match="grad_norm"):
        curves.choose(runs, ["grad_norm"])
