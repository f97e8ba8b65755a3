"""Surveys: the page is blind and whole, votes through a real browser come out as they were planted, and the figures."""

import base64
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import run_bad, run_cli, run_ok
from PIL import Image
from scipy import stats

from dalle_cli.artifacts import open_artifact, write_artifact
from dalle_cli.report import html, survey

RED, BLUE = (200, 30, 30), (30, 30, 200)  # the pictures of A and of B; the green tells the caption
CAPTIONS = [
    "a tutu radish walking a dog",
    "ein Löwe auf dem Mond",
    '</script><script>document.title = "broken"</script> & <b>bold</b>',
    "{{ style }} and a very long caption " + " ".join(["that goes on and on"] * 12),
    "a red circle",
    "강아지",
]


def write_images(path, color, captions=CAPTIONS, side=16, **more):
    """Plain pictures of a color, whose green is the caption's number."""
    pixels = np.empty((len(captions), 3, side, side), dtype=np.uint8)
    for row in range(len(captions)):
        pixels[row] = np.array([color[0], row, color[2]], dtype=np.uint8)[:, None, None]
    ids = [str(row) for row in range(len(captions))]
    return write_artifact(path, "images", {"images": pixels, "ids": ids, "text": list(captions), **more}, {}, [])


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """A, whose pictures are red, and B, larger ones in blue, in another order and with a caption more; read only."""
    folder = tmp_path_factory.mktemp("sides")
    a = write_images(folder / "ours.images.safetensors", RED)
    b = write_images(folder / "theirs.images.safetensors", BLUE, ["only here", *reversed(CAPTIONS)], side=32)
    return a, b


@pytest.fixture(scope="module")
def page(sides, tmp_path_factory):
    """The survey's page; read only."""
    path = tmp_path_factory.mktemp("page") / "survey.html"
    assert run_ok("survey", *sides, "-o", path) == str(path)
    return path


def facts(page):
    """What the page knows."""
    found = re.search(r'<script type="application/json" id="values">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


def decode(uri):
    """The pixels of a data URI."""
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert not image.info
    return np.asarray(image)


def is_a(uri):
    """Whether a picture is of A: red."""
    pixel = decode(uri)[0, 0]
    return bool(pixel[0] > pixel[2])


# ---- The page ----


def test_each_caption_comes_once_with_its_own_two_pictures(sides, page):
    found = facts(page)
    assert sorted(item["caption"] for item in found["items"]) == sorted(CAPTIONS)
    for item in found["items"]:
        of_key = dict(item["images"])
        row = CAPTIONS.index(item["caption"])
        a, b = (decode(of_key[survey.key(found["survey"], item["caption"], side)]) for side in "AB")
        assert a.shape == (16, 16, 3)
        assert b.shape == (32, 32, 3)
        assert (a == [RED[0], row, RED[2]]).all()
        assert (b == [BLUE[0], len(CAPTIONS) - row, BLUE[2]]).all()


def test_the_page_is_blind(sides, tmp_path):
    """Names, sides and order of the inputs stand nowhere in it, and the order of keys says nothing."""
    captions = [f"caption {i:03d}" for i in range(200)]
    a, b = (
        write_images(tmp_path / f"{name}.safetensors", c, captions, 1) for name, c in (("quagga", RED), ("okapi", BLUE))
    )
    path = Path(run_ok("survey", a, b, "-o", tmp_path / "survey.html"))
    text = path.read_text()
    assert not {"quagga", "okapi"} & set(re.findall(r"\w+", re.sub(r"data:image[^\"]*", "", text)))
    assert str(tmp_path) not in text
    items = facts(path)["items"]
    assert {type(x) for item in items for x in item} == {str}
    assert all(set(item) == {"caption", "images"} for item in items)
    assert all(re.fullmatch("[0-9a-f]{16}", key) for item in items for key, _ in item["images"])
    first = sum(is_a(item["images"][0][1]) for item in items)
    assert 70 < first < 130  # of 200, fair coins: five deviations
    order = [item["caption"] for item in items]
    assert abs(stats.spearmanr(np.arange(200), [captions.index(c) for c in order]).statistic) < 0.3


def test_the_page_needs_nothing_but_itself(page):
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")", text)
    assert all(uri.startswith("data:") for uri in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "default-src 'none'" in text
    assert "{{" not in text.replace("{{ style }} and a very", "")  # which is a caption


def test_same_inputs_same_bytes_and_a_seed_of_its_own(sides, page, tmp_path):
    again, other = tmp_path / "again.html", tmp_path / "other.html"
    run_ok("survey", *sides, "-o", again, "--seed", 0)
    run_ok("survey", *sides, "-o", other, "--seed", 1)
    assert again.read_bytes() == page.read_bytes()
    assert facts(other)["survey"] != facts(page)["survey"]
    assert {k for i in facts(other)["items"] for k, _ in i["images"]}.isdisjoint(
        k for i in facts(page)["items"] for k, _ in i["images"]
    )


def test_prompts_limit_the_survey_and_the_first_picture_of_each_counts(tmp_path):
    captions = ["one", "two", "two", "three", "two", "  "]
    a, b = (write_images(tmp_path / f"{name}.safetensors", c, captions) for name, c in (("a", RED), ("b", BLUE)))
    (tmp_path / "prompts.txt").write_text("two\n\nthree\ntwo\n")
    run_ok("survey", a, b, "--prompts", tmp_path / "prompts.txt", "--votes", 3)
    found = facts(tmp_path / "survey.html")
    assert {item["caption"] for item in found["items"]} == {"two", "three"}
    assert found["wanted"] == 3
    (two,) = (item for item in found["items"] if item["caption"] == "two")
    assert {int(decode(uri)[0, 0, 1]) for _, uri in two["images"]} == {1}
    pairs = survey.pair(open_artifact(a), open_artifact(b))
    assert [(p.caption, p.a, p.b) for p in pairs] == [("one", 0, 0), ("two", 1, 1), ("three", 3, 3)]


def test_faults_of_a_page_are_told_in_a_line(sides, tmp_path):
    a, b = sides
    out = tmp_path / "survey.html"
    assert "found 1" in run_bad("survey", a)
    assert "found 0" in run_bad("survey")
    assert "--tally" in run_bad("survey", a, b, "--json")
    assert "the same" in run_bad("survey", a, a, "-o", out)
    other = write_images(tmp_path / "other.safetensors", RED, ["else"])
    assert "in common" in run_bad("survey", a, other, "-o", out)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue cat\na dog\n")
    line = run_bad("survey", a, b, "--prompts", tmp_path / "prompts.txt", "-o", out)
    assert "'a blue cat' and of 1 more" in line
    mute = tmp_path / "mute.safetensors"
    write_artifact(mute, "images", {"images": np.zeros((1, 3, 4, 4), np.uint8), "ids": ["0"]}, {}, [])
    assert "prompts" in run_bad("survey", mute, b, "-o", out)
    assert "artifact" in run_bad("survey", page_of(tmp_path), b, "-o", out)
    assert not out.exists()


def page_of(folder):
    """Some file that is no artifact."""
    (folder / "notes.html").write_text("<!doctype html>notes")
    return folder / "notes.html"


def test_only_a_survey_is_replaced(sides, tmp_path):
    notes = page_of(tmp_path)
    assert "notes.html" in run_bad("survey", *sides, "-o", notes)
    assert "folder" in run_bad("survey", *sides, "-o", tmp_path)
    assert notes.read_text() == "<!doctype html>notes"
    run_ok("survey", *sides, "-o", notes, "--force")
    run_ok("survey", *sides, "-o", notes)


def contrast(a, b):
    """Of two colors #rrggbb (WCAG 2)."""
    rgb = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in (a, b)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    dark, light = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_palettes(scheme):
    blocks = re.findall(r":root \{(.*?)\}", (html.TEMPLATES / "page.css").read_text(), re.DOTALL)
    assert len(blocks) == 2
    color = dict(re.findall(r"--([\w-]+): (#\w{6});", blocks[scheme == "dark"]))
    pairs = [*itertools.product(("ink", "faint", "accent", "accent-2", "warn"), ("paper", "raised"))]
    for ink, paper in [*pairs, ("accent", "on-accent"), ("accent-2", "on-accent")]:
        assert contrast(color[ink], color[paper]) >= 4.5, (ink, paper)


# ---- The tally ----


def votes_file(path, page, rater, choices, **changes):
    """Votes as the page saves them; `choices` are {caption: (more realistic, matches better)}, each A or B."""
    found = facts(page)
    name = found["survey"]
    votes = [
        {
            "caption": caption,
            "first": survey.key(name, caption, "AB"[number % 2]),
            "realistic": survey.key(name, caption, realistic),
            "matches": survey.key(name, caption, matches),
        }
        for number, (caption, (realistic, matches)) in enumerate(choices.items())
    ]
    about = {key: found[key] for key in ("format", "version", "survey", "inputs", "wanted")}
    about |= {"captions": len(found["items"]), "rater": rater, "votes": votes, **changes}
    path.write_text(json.dumps(about))
    return path


def test_planted_votes_give_planted_shares(sides, page, tmp_path):
    """Five raters, six captions: A leads in realism 4 to 2, and in matching 2 to 3 with a caption nobody finished."""
    realistic = ["AAAAA", "AAABB", "BBABA", "BBBBB", "AAAAB", "AAABB"]
    matches = ["BBBBB", "BABAB", "AAAAA", "ABABA", "BBBBA", "AB"]
    files = []
    for r in range(5):
        told = {c: (realistic[i][r], matches[i][r]) for i, c in enumerate(CAPTIONS) if r < len(matches[i])}
        files.append(votes_file(tmp_path / f"votes-{r}.json", page, f"rater {r}", told))
    out = tmp_path / "tally.json"
    result = run_cli("survey", "--tally", *files, "-o", out)
    assert (result.status, result.stdout) == (0, f"{out}\n")
    assert "1 of 6 captions have fewer than 5 votes" in result.stderr
    found = json.loads(out.read_text())
    assert found["raters"] == [f"rater {r}" for r in range(5)]
    assert found["inputs"] == {side: open_artifact(path).digest for side, path in zip("AB", sides, strict=True)}
    assert (found["captions"], found["captions_short"], found["votes_wanted"]) == (6, 1, 5)
    real, match = found["questions"]["realistic"], found["questions"]["matches"]
    assert real["captions"] == {"A": 3 + 1, "B": 2, "tie": 0}  # of the last caption's two votes both are for A
    assert real["majority"] == pytest.approx(4 / 6)
    assert real["votes"] == {"A": 5 + 3 + 2 + 0 + 4 + 2, "B": 0 + 2 + 3 + 5 + 1 + 0}
    assert real["share"] == pytest.approx(16 / 27)
    assert match["captions"] == {"A": 2, "B": 3, "tie": 1}
    assert match["majority"] == pytest.approx(2 / 5)
    wilson = stats.binomtest(2, 5).proportion_ci(method="wilson")
    assert match["majority_interval"] == pytest.approx([wilson.low, wilson.high])
    of = {row["caption"]: row for row in found["by_caption"]}
    assert of[CAPTIONS[1]] == {"caption": CAPTIONS[1], "realistic": {"A": 3, "B": 2}, "matches": {"A": 2, "B": 3}}
    assert of[CAPTIONS[5]]["matches"] == {"A": 1, "B": 1}
    first = [told == "AB"[i % 2] for q in (realistic, matches) for i in range(6) for told in q[i][: len(matches[i])]]
    assert found["first_share"] == pytest.approx(np.mean(first))
    run_ok("survey", "--tally", *files, "-o", out)  # an earlier tally is replaced
    assert json.loads(out.read_text()) == found


def test_a_tally_without_o_is_told_on_stdout(page, tmp_path):
    files = [votes_file(tmp_path / f"{r}.json", page, r, dict.fromkeys(CAPTIONS, ("A", "A"))) for r in ("Anna", "Ben")]
    shown = run_ok("survey", "--tally", *files)
    assert "A wins 6 captions, B 0, ties 0" in shown
    assert "majority for A 100.0% (95%: 61.0% to 100.0%)" in shown
    assert "6 of 6 captions judged by 2 raters" in shown
    found = json.loads(run_ok("survey", "--tally", *files, "--json"))
    assert found["questions"]["matches"]["agreement"] == 1
    assert found["questions"]["matches"]["alpha"] is None
    even = votes_file(tmp_path / "even.json", page, "Eve", dict.fromkeys(CAPTIONS, ("B", "B")))
    assert "majority for A undecided" in run_ok("survey", "--tally", files[0], even)


def test_faults_of_votes_are_told_in_a_line(sides, page, tmp_path):
    choices = {CAPTIONS[0]: ("A", "B"), CAPTIONS[1]: ("A", "A")}
    good = votes_file(tmp_path / "good.json", page, "Anna", choices)

    def bad(*files):
        return run_bad("survey", "--tally", *files, "-o", tmp_path / "tally.json")

    twice = votes_file(tmp_path / "twice.json", page, " ANNA ", choices)
    assert "one file of each rater" in bad(good, twice)
    assert "good.json" in bad(good, good)
    other = tmp_path / "other.html"
    run_ok("survey", *sides, "-o", other, "--seed", 3)
    line = bad(good, votes_file(tmp_path / "other.json", other, "Ben", choices))
    assert "one survey" in line
    assert facts(page)["survey"][:12] in line
    assert facts(other)["survey"][:12] in line
    moved = votes_file(tmp_path / "moved.json", page, "Ben", choices, survey=facts(other)["survey"])
    assert "another survey" in bad(moved)
    value = json.loads(good.read_text())
    broken = tmp_path / "broken.json"
    for change in (
        {"rater": "  "}, {"rater": None}, {"votes": []}, {"votes": 3}, {"votes": [3]}, {"votes": value["votes"] * 2},
        {"captions": 1}, {"captions": True}, {"wanted": 0}, {"inputs": []}, {"inputs": 3}, {"format": "x"},
        {"version": 2}, {"votes": [{**value["votes"][0], "matches": ["x"]}]},
        {"votes": [{**value["votes"][0], "caption": 3}]},
    ):  # fmt: skip
        broken.write_text(json.dumps({**value, **change}))
        line = bad(broken)
        assert "broken.json" in line
        assert not {"unpack", "indices", "subscriptable", "iterable", "sequence"} & set(line.split())  # Python's words
    for missing in value:
        broken.write_text(json.dumps({k: v for k, v in value.items() if k != missing}))
        assert "broken.json" in bad(broken)
    for text in ("", "{", "[]", "3", "\udcff", "[" * 100_000):
        broken.write_text(text, errors="surrogateescape")
        line = bad(broken)
        assert "broken.json; save them again" in line
        assert "no JSON" in line or text in ("[]", "3")
    assert "absent.json" in bad(tmp_path / "absent.json")
    assert "found none" in bad()
    assert "--prompts" in run_bad("survey", "--tally", good, "--prompts", good)
    (tmp_path / "notes.json").write_text("{}")
    assert "notes.json" in run_bad("survey", "--tally", good, "-o", tmp_path / "notes.json")
    assert not (tmp_path / "tally.json").exists()


# ---- Figures, against others' ----


@pytest.mark.parametrize("total", [1, 2, 7, 40, 1000])
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_wilson_is_scipys(total, confidence):
    for won in {0, 1, total // 3, total - 1, total}:
        theirs = stats.binomtest(won, total).proportion_ci(confidence, method="wilson")
        assert survey.wilson(won, total, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_bootstrap_is_scipys():
    random = np.random.default_rng(1)
    total = random.integers(1, 6, size=80)
    won = random.binomial(total, 0.7)
    theirs = stats.bootstrap(
        (won, total), lambda w, t, axis: w.sum(axis) / t.sum(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert survey.bootstrap(won, total, 0) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert survey.bootstrap(won, total, 0) == survey.bootstrap(won, total, 0)
    assert survey.bootstrap(won, total, 0) != survey.bootstrap(won, total, 1)


def test_the_bootstrap_draws_captions_not_votes():
    """Five equal votes a caption know no more than one: the interval is that of the captions' number."""
    won = np.array([1] * 60 + [0] * 40)
    low, high = survey.bootstrap(5 * won, np.full(100, 5), 0)
    deviation = np.sqrt(0.6 * 0.4 / 100)
    assert (high - low) == pytest.approx(2 * 1.96 * deviation, rel=0.06)


def pairs_alpha(counts):
    """Krippendorff's alpha by going through all pairs of votes, one by one."""
    units = [[choice for choice, n in enumerate(row) for _ in range(n)] for row in counts]
    units = [unit for unit in units if len(unit) > 1]
    every = [vote for unit in units for vote in unit]
    seen = sum(sum(x != y for x, y in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    chance = sum(x != y for x, y in itertools.permutations(every, 2)) / (len(every) - 1)
    return 1 - seen / len(every), 1 - seen / chance


def test_agreement_is_that_of_all_pairs():
    random = np.random.default_rng(3)
    for choices in (2, 3):
        counts = random.integers(0, 4, size=(30, choices))
        assert survey.agree(counts) == pytest.approx(pairs_alpha(counts))


def test_alpha_of_a_published_example():
    """Krippendorff's example of three coders and missing values: nominal alpha 0.691."""
    coders = ("*****34121133*3", "1*213343*******", "**21344*21133*4")
    counts = np.array([[unit.count(str(c)) for c in (1, 2, 3, 4)] for unit in map("".join, zip(*coders, strict=True))])
    assert survey.agree(counts)[1] == pytest.approx(0.691, abs=5e-4)


def test_agreement_where_there_is_none_to_speak_of():
    assert survey.agree(np.array([[1, 0], [0, 1]])) == (None, None)
    assert survey.agree(np.array([[5, 0], [5, 0]])) == (1.0, None)
    assert survey.agree(np.array([[5, 0], [0, 5]])) == (1.0, 1.0)


# ---- In a browser ----


@pytest.fixture
def visit(browser, page):
    """Open the page in a browser that knows nothing yet; whatever goes wrong in it, or to the network, is a failure."""
    faults, contexts = [], []

    def open_page(path=page, script=None, **options):
        context = browser.new_context(offline=True, **{"viewport": {"width": 1000, "height": 800}, **options})
        contexts.append(context)
        if script:
            context.add_init_script(script)
        tab = context.new_page()
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        tab.on(
            "request", lambda sent: faults.append(sent.url) if sent.url[:5] not in ("file:", "data:", "blob:") else 0
        )
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def enter(tab, rater):
    tab.get_by_label("Your name").fill(rater)
    tab.keyboard.press("Enter")


def come_back(tab):
    """Load the page anew, a moment later: the browser hands on what a page keeps only after the page has said it."""
    tab.wait_for_timeout(500)
    tab.reload()


def seen(tab):
    """The caption, the number of the question, and where A's picture lies: 0 left, 1 right."""
    sources = tab.locator(".pick img").evaluate_all("images => images.map(image => image.src)")
    of_a = [is_a(source) for source in sources]
    assert sorted(of_a) == [False, True]
    number = int(tab.locator("#question .number").inner_text()) - 1
    return tab.locator("#caption").text_content(), number, of_a.index(True)


def vote(tab, plan, steps, by="arrows"):
    """Answer so many questions as `plan` (caption -> an answer for each question) says; the captions, in order."""
    met = []
    for _ in range(steps):
        caption, question, at = seen(tab)
        met.append(caption)
        place = at if plan[caption][question] == "A" else 1 - at
        if by == "mouse":
            tab.locator(".pick").nth(place).click()
        else:
            tab.keyboard.press({"arrows": ("ArrowLeft", "ArrowRight"), "digits": "12"}[by][place])
    return met


def download(tab, folder):
    with tab.expect_download() as waiting:
        tab.locator("#save").click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def plan_of(realistic, matches):
    return {c: (r, m) for c, r, m in zip(CAPTIONS, realistic, matches, strict=True)}


ALL_A = dict.fromkeys(CAPTIONS, ("A", "A"))


def test_three_raters_vote_and_planted_votes_come_out(visit, tmp_path):
    """By arrows with a reload in the middle, by mouse, and by digits."""
    plans = {
        "Anna Müller": (plan_of("AAABBB", "AAAAAB"), "arrows"),
        "ben": (plan_of("AABBBB", "AAAAAA"), "mouse"),
        "Çelik/../x": (plan_of("ABABBB", "BBAAAA"), "digits"),
    }
    files, orders = [], []
    for rater, (plan, by) in plans.items():
        tab = visit()
        enter(tab, rater)
        order = vote(tab, plan, 5, by)
        if by == "arrows":
            assert tab.locator("#count").inner_text() == "3 of 6"
            come_back(tab)
            assert tab.get_by_label("Your name").input_value() == rater
            assert tab.locator("#about-name").inner_text() == "You have judged 2 of 6 pairs."
            tab.get_by_role("button", name="Go on").click()
            assert tab.locator("#count").inner_text() == "3 of 6"
            assert seen(tab)[:2] == (order[-1], 1)
        order += vote(tab, plan, 7, by)
        assert sorted(order) == sorted(2 * CAPTIONS)
        assert order[::2] == order[1::2]
        assert "all 6 pairs" in tab.locator("#done").inner_text()
        files.append(download(tab, tmp_path))
        assert files[-1].name in tab.locator("#saved").inner_text()
        orders.append(order[::2])
    assert [file.name for file in files] == ["votes-anna-müller.json", "votes-ben.json", "votes-çelik-x.json"]
    assert len(set(map(tuple, orders))) == 3
    found = json.loads(run_ok("survey", "--tally", *files, "--json"))
    assert found["raters"] == sorted(plans)
    planted = {row["caption"]: (row["realistic"]["A"], row["matches"]["A"]) for row in found["by_caption"]}
    assert planted == dict(zip(CAPTIONS, [(3, 2), (2, 2), (2, 3), (0, 3), (0, 3), (0, 2)], strict=True))
    assert found["questions"]["realistic"]["captions"] == {"A": 3, "B": 3, "tie": 0}
    assert found["questions"]["matches"]["majority"] == 1


def test_undo_and_slips(visit, tmp_path):
    """Undo goes back one answer at a time; double clicks and keys held down answer once; a name is no vote."""
    tab = visit()
    tab.get_by_label("Your name").fill("")
    tab.keyboard.type("u12")
    assert tab.locator("#start").is_visible()
    tab.keyboard.press("Enter")
    assert tab.locator("#undo").is_disabled()
    begin = seen(tab)
    tab.locator(".pick").first.dblclick()
    assert seen(tab) == (begin[0], 1, begin[2])
    assert "your first answer" in tab.locator(".pick").first.text_content()
    assert "your first answer" not in tab.locator(".pick").last.text_content()
    tab.keyboard.press("Control+1")
    assert seen(tab)[1] == 1
    tab.keyboard.down("1")
    tab.keyboard.down("1")  # as a keyboard repeats it
    tab.keyboard.up("1")
    second = seen(tab)
    assert second[1] == 0
    assert second[0] != begin[0]
    tab.keyboard.press("u")
    assert seen(tab) == (begin[0], 1, begin[2])
    tab.locator("#undo").click()
    assert seen(tab) == begin
    tab.keyboard.press("Backspace")
    assert seen(tab) == begin
    vote(tab, plan_of("AAAAAA", "BBBBBB"), 12)
    tab.keyboard.press("U")
    assert tab.locator("#count").inner_text() == "6 of 6"
    vote(tab, plan_of("AAAAAA", "BBBBBB"), 1, "digits")
    found = json.loads(run_ok("survey", "--tally", download(tab, tmp_path), "--json"))
    assert found["questions"]["realistic"]["share"] == 1
    assert found["questions"]["matches"]["share"] == 0
    tab.get_by_role("button", name="Another person").click()
    assert tab.get_by_label("Your name").input_value() == ""
    enter(tab, "somebody else")
    assert tab.locator("#count").inner_text() == "1 of 6"


def test_half_a_survey_can_be_saved_and_other_raters_answers_stay_apart(visit, tmp_path):
    tab = visit()
    enter(tab, "Anna")
    vote(tab, ALL_A, 3)
    with tab.expect_download() as waiting:
        tab.locator("#save-now").click()
    waiting.value.save_as(tmp_path / "half.json")
    half = json.loads((tmp_path / "half.json").read_text())
    assert len(half["votes"]) == 1  # the second caption has but one answer
    assert set(half["votes"][0]) == {"caption", "first", "realistic", "matches"}
    come_back(tab)
    enter(tab, "Ben")
    assert tab.locator("#count").inner_text() == "1 of 6"
    come_back(tab)
    enter(tab, " aNNa ")
    assert seen(tab)[1] == 1
    assert tab.locator("#count").inner_text() == "2 of 6"


def test_sides_are_random_and_a_raters_own(visit, page):
    tab = visit()
    name, lay = facts(page)["survey"], {}
    firsts = "names => names.map(name => shuffled(name).map(item => [item.caption, item.images[0][0]]))"
    raters = [f"rater {number}" for number in range(12)]
    orders = tab.evaluate(firsts, raters)
    assert tab.evaluate(firsts, raters) == orders
    for order in orders:
        assert sorted(caption for caption, _ in order) == sorted(CAPTIONS)
        for place, (caption, key) in enumerate(order):
            lay.setdefault(caption, []).append((place, key == survey.key(name, caption, "A")))
    assert 20 < sum(first for places in lay.values() for _, first in places) < 52  # of 72
    assert all(len({place for place, _ in places}) > 2 for places in lay.values())
    assert all(0 < sum(first for _, first in places) < 12 for places in lay.values())


def test_what_the_browser_kept_is_checked(visit, page):
    tab = visit()
    for number, kept in enumerate(("no JSON", "3", '["0123456789abcdef"]', "{}", "null")):
        place = f"dalle-survey/{facts(page)['survey']}/rater {number}"
        tab.evaluate("([place, kept]) => localStorage.setItem(place, kept)", [place, kept])
        come_back(tab)
        enter(tab, f"Rater {number}")
        assert tab.locator("#count").inner_text() == "1 of 6"
        assert seen(tab)[1] == 0


def test_without_storage_one_is_warned_and_can_vote(visit):
    tab = visit(script='Object.defineProperty(window, "localStorage", {get() { throw new Error("denied"); }})')
    assert tab.locator("#forgets").is_visible()
    enter(tab, "Anna")
    assert set(vote(tab, ALL_A, 12)) == set(CAPTIONS)
    assert tab.locator("#done").is_visible()
    assert tab.title() == "Which image is better?"  # captions are text, whatever markup they look like
    assert visit().locator("#forgets").is_hidden()


def test_by_tab_and_enter_with_names_for_all(visit):
    """What a screen reader says, and a vote with nothing but Tab and Enter."""
    tab = visit()
    enter(tab, "Anna")
    first = seen(tab)
    assert tab.evaluate("document.activeElement.id") == "question"
    assert tab.get_by_role("heading", name="Which image is more realistic?").is_visible()
    assert tab.get_by_role("progressbar", name="Progress").get_attribute("aria-valuetext") == "pair 1 of 6"
    pictures = tab.get_by_role("group", name="Which image is more realistic?").get_by_role("button")
    assert pictures.count() == 2
    assert "First image Left" in " ".join(pictures.first.aria_snapshot().split())
    assert "Second image Right" in " ".join(pictures.last.aria_snapshot().split())
    tab.keyboard.press("Tab")
    outline = tab.locator(".pick").first.evaluate("e => getComputedStyle(e).outlineStyle")
    assert outline == "solid"
    tab.keyboard.press("Enter")
    assert seen(tab) == (first[0], 1, first[2])
    tab.keyboard.press("Enter")  # the focus has gone to the question: nothing is answered
    assert seen(tab)[1] == 1


@pytest.mark.parametrize("size", [(320, 568), (390, 844), (667, 375), (1280, 720)])
def test_it_fits_a_screen_without_scrolling(visit, size):
    """Question and both pictures are on the screen at once, whatever the caption; each is large enough to judge."""
    tab = visit(viewport={"width": size[0], "height": size[1]}, has_touch=size[0] < 700, is_mobile=size[0] < 700)
    enter(tab, "Anna")
    for _ in CAPTIONS:
        wide, high = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert wide <= size[0]
        assert high <= size[1]
        for image in tab.locator(".pick img").all():
            box = image.bounding_box()
            assert box["width"] == pytest.approx(box["height"], abs=1)
            assert box["width"] >= 120
        vote(tab, ALL_A, 2, "digits")


def test_light_and_dark(visit):
    shades = {}
    for scheme in ("light", "dark"):
        tab = visit(color_scheme=scheme)
        shades[scheme] = tab.evaluate(
            "['backgroundColor', 'color'].map(of => parseInt(getComputedStyle(document.body)[of].slice(4)))"
        )
    assert shades["light"][0] > 200 > 60 > shades["light"][1]
    assert shades["dark"][0] < 60 < 200 < shades["dark"][1]
