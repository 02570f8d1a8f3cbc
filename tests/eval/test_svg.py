"""The README's picture: well-formed, alone, readable: names apart, everything inside, and where the numbers are."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.study import write_results
from eval.study_records import read_study
from eval.svg import BOTTOM, HEIGHT, LEFT, MOST_LINES, TOP, WIDTH, Label, _apart, picture

from .study_folders import Made, example, make_study

SVG = "{http://www.w3.org/2000/svg}"


def drawn(folder: Path, at: str) -> ET.Element:
    """The picture, parsed; it must be alone: no script, no address, nothing loaded."""
    text = picture(read_study(folder), at)
    tree = ET.fromstring(text)
    names = {element.tag.removeprefix(SVG) for element in tree.iter()}
    assert names <= {"svg", "title", "desc", "style", "defs", "clipPath", "rect", "text", "path", "circle", "g"}, names
    assert not re.search(r"http(?!://www\.w3\.org/2000/svg)|href|@import|url\((?!#)|\bon\w+=", text)
    assert not re.search(r"\bnan\b", text, re.IGNORECASE)
    return tree


def texts(tree: ET.Element) -> list[str]:
    return [element.text for element in tree.iter(f"{SVG}text")]


def ends(tree: ET.Element) -> dict[str, tuple[float, float]]:
    """{name: its line's end}."""
    names = [e.text for e in tree.iter(f"{SVG}text") if "label" in e.get("class", "")]
    dots = [(float(e.get("cx")), float(e.get("cy"))) for e in tree.iter(f"{SVG}circle")]
    return dict(zip(names, dots, strict=True))


def test_every_variant_has_its_name_at_its_end_and_the_longer_runs_only_in_time(tmp_path):
    folder = example(tmp_path)
    by_time, by_tokens = ends(drawn(folder, "time")), ends(drawn(folder, "tokens"))
    experts = {"experts-4", "experts-8", "experts-16", "experts-32"}
    assert set(by_time) == {"dense", "dense-longer", *experts}
    assert set(by_tokens) == {"dense", *experts}
    assert len({round(x) for x, _ in by_tokens.values()}) == 1, "equal tokens end at one place"
    dense = by_time["dense"][0]
    left = min(x for x, _ in by_time.values())
    assert left == dense and by_time["experts-32"][0] > by_time["experts-16"][0] > by_time["experts-8"][0]
    order = sorted(by_tokens, key=lambda name: by_tokens[name][1])
    assert order == ["dense", "experts-4", "experts-8", "experts-16", "experts-32"], "lower is better"


def test_everything_that_says_something_is_inside(tmp_path):
    for at in ("time", "tokens"):
        tree = drawn(example(tmp_path / at), at)
        for x, y in ends(tree).values():
            assert LEFT <= x <= WIDTH and TOP - 1 <= y <= HEIGHT - BOTTOM + 1
        for element in tree.iter(f"{SVG}text"):
            assert 0 < float(element.get("x")) < WIDTH and 0 < float(element.get("y")) < HEIGHT, element.text


def test_it_says_what_is_drawn(tmp_path):
    folder = example(tmp_path)
    by_time, by_tokens = texts(drawn(folder, "time")), texts(drawn(folder, "tokens"))
    assert "Bits per byte of held-out python against time of training" in by_time
    assert "minutes of training" in by_time and "million tokens" in by_tokens
    assert any(
        "mean of 3 seeds; band: 95 % interval of the mean; dotted: dense trained just so long" in text
        for text in by_time
    )
    assert not any("dotted" in text for text in by_tokens)
    write_results(folder)
    differences = json.loads((folder / "results.json").read_text())["differences"]
    best = min((d for d in differences if d["at"] == "time"), key=lambda d: d["bits"]["mean"])
    wanted = f"{best['variant']} against dense in equal time: −{-best['bits']['mean']:.3f} ± {best['bits']['half_width_95']:.3f}"
    assert any(wanted in text for text in by_time), by_time


@pytest.mark.parametrize(("seeds", "words"), [((1,), "mean of 1 seed"), ((1, 2), "band: from one seed to the other")])
def test_it_says_what_few_seeds_allow(tmp_path, seeds, words):
    bits = {seed: 1 + 0.01 * seed for seed in seeds}
    tree = drawn(make_study(tmp_path, [Made("dense", bits), Made("moe", bits, experts=4)], seeds=seeds), "tokens")
    assert any(words in text for text in texts(tree))
    has_bands = any("band" in e.get("class", "") for e in tree.iter(f"{SVG}path"))
    assert has_bands == (len(seeds) > 1)


def test_no_picture_without_a_clock_and_none_without_curves(tmp_path):
    study = read_study(make_study(tmp_path, [Made("dense", {1: 1.0}, step_seconds=None)]))
    assert picture(study, "time") == "" and picture(study, "tokens")
    assert picture(read_study(make_study(tmp_path / "2", [Made("dense", {})])), "tokens") == ""


def test_more_variants_than_fit_leave_the_reference_and_the_best(tmp_path):
    made = [Made("dense", {1: 2.0})] + [Made(f"v{i}", {1: 1.0 + 0.05 * i}) for i in range(12)]
    shown = ends(drawn(make_study(tmp_path, made, seeds=(1,)), "tokens"))
    assert set(shown) == {"dense", *(f"v{i}" for i in range(MOST_LINES - 1))}


def test_the_variant_of_the_subtitle_is_in_the_picture(tmp_path):
    """At equal time that may be one of the worst at equal tokens."""
    ranks = range(MOST_LINES + 1)
    dense = Made("dense", {1: 2.0, 2: 2.01}), Made("longer", {1: 1.0, 2: 1.01}, steps=1600, longer=True, of="dense")
    slow = [Made(f"v{i}", {1: 1.5 + 0.01 * i, 2: 1.512 + 0.01 * i}, step_seconds=1.9) for i in ranks]
    fast = Made("fast", {1: 1.7, 2: 1.711}, step_seconds=0.5)
    tree = drawn(make_study(tmp_path, [*dense, *slow, fast], seeds=(1, 2)), "time")
    assert any(text.startswith("fast against dense in equal time") for text in texts(tree))
    assert "fast" in ends(tree) and len(ends(tree)) == MOST_LINES


def test_it_says_over_how_many_runs_and_which_are_unfinished(tmp_path):
    folder = make_study(tmp_path, [Made("dense", {1: 1.0, 2: 1.1, 3: 1.2}), Made("moe", {1: 0.9, 2: 1.0}, experts=4)])
    assert any(
        "mean of 2 to 3 seeds; band: 95 % interval, or both of two seeds" in text
        for text in texts(drawn(folder, "tokens"))
    )
    assert set(ends(drawn(folder, "tokens"))) == {"dense", "moe (2 of 3 seeds)"}
    for path in (folder.parent / "cells").glob("moe-*/evaluation.json"):
        path.unlink()
    tree = drawn(folder, "tokens")
    assert any("mean of 2 to 3 seeds" in text for text in texts(tree)), "the third run of moe never began"
    assert set(ends(tree)) == {"dense", "moe (so far)"}


def test_texts_of_strangers_stay_texts(tmp_path):
    evil = '</text><script>alert(1)</script>\x02"&'
    folder = make_study(tmp_path, [Made("dense", {1: 1.0}), Made("b", {1: 1.0})], seeds=(1,))
    path = folder / "study.json"
    tree = json.loads(path.read_text())
    tree["variants"][1]["name"] = evil
    path.write_text(json.dumps(tree))
    assert any(text.startswith("</text><script>alert(1)") for text in texts(drawn(folder, "tokens")))


def test_a_dark_page_gets_lighter_lines(tmp_path):
    style = next(drawn(example(tmp_path), "tokens").iter(f"{SVG}style")).text
    light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
    assert dark and re.findall(r"\.s0 \{ stroke: (#\w+)", light) != re.findall(r"\.s0 \{ stroke: (#\w+)", dark)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(LEFT, 700), st.floats(TOP, HEIGHT - BOTTOM)), min_size=1, max_size=MOST_LINES))
def test_names_at_the_ends_never_touch(points):
    labels = _apart([Label(i, "experts-16", point, point[0] + 11, point[1]) for i, point in enumerate(points)])
    for i, one in enumerate(labels):
        assert TOP <= one.y <= HEIGHT - BOTTOM
        assert not any(one.overlaps(other) for other in labels[i + 1 :])


TEXT_BOXES = """() => [...document.querySelectorAll('text')].map(e => {
    const box = e.getBoundingClientRect(); return [e.textContent, box.left, box.top, box.right, box.bottom]; })"""


@pytest.mark.slow
def test_in_a_browser_no_text_touches_another_or_leaves_the_picture(tmp_path, browser):
    folder = example(tmp_path)
    write_results(folder)
    for name in ("clock.svg", "tokens.svg"):
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="dark")
        page.goto((folder / name).as_uri())
        boxes = page.evaluate(TEXT_BOXES)
        assert len(boxes) > 10
        for i, (text, left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left and right <= WIDTH and 0 <= top and bottom <= HEIGHT, (name, text)
            for other, *box in boxes[i + 1 :]:
                apart = right <= box[0] or box[2] <= left or bottom <= box[1] + 3 or box[3] <= top + 3
                assert apart, f"{name}: {text!r} touches {other!r}"
        paper = page.evaluate("getComputedStyle(document.querySelector('.paper')).fill")
        assert sum(map(int, re.findall(r"\d+", paper))) < 200, "dark paper for a dark page"
        page.close()


BEYOND = """() => [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('.scroll') && !e.closest('svg') && getComputedStyle(e).display != 'none').map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path, browser):
    """Phone, desk, dark, paper: nothing sticks out, the page's own policy refuses nothing, charts and dots have a place."""
    folder = example(tmp_path)
    write_results(folder)
    said = []
    for width, scheme, media in ((390, "dark", "screen"), (1280, "light", "screen"), (695, "light", "print")):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.emulate_media(media=media)
        page.goto((folder / "report.html").as_uri())
        assert page.evaluate(BEYOND) == []
        heights = page.evaluate("[...document.querySelectorAll('.area')].map(a => a.clientHeight)")
        assert len(heights) >= 5 and min(heights) > 100
        dots = page.evaluate(
            "[...document.querySelectorAll('.dots em')].map(e => { const d = e.getBoundingClientRect(), "
            "t = e.parentElement.getBoundingClientRect(); return d.left >= t.left && d.right <= t.right; })"
        )
        assert len(dots) == 12 and all(dots), "every dot within its track"
        page.close()
    assert said == []
