"""The report: one file that says what was measured, and nothing that was not."""

import json
import re
from html.parser import HTMLParser

import pytest
from helpers_course import PROFILE

from course import artifacts, report

VOID = {"meta", "br", "line", "rect", "path", "polyline", "link", "img", "hr", "input"}
NAMES = ("01_first", "02_second")


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The folder of a run that is done, with something of everything."""
    monkeypatch.setenv("MINIMIND_HOME", str(tmp_path))  # a course with other chapters than ours
    folder = tmp_path / "2026-01-01-cpu"
    folder.mkdir()
    (folder / "profile.yaml").write_text(
        PROFILE.format(name="cpu", precision="auto", device="auto") + "  pretrain/facts: [0.9, null]\n  first/never: [1, 2]\n"
    )
    chapters = {name: {"status": "done", "seconds": 30.0 + 60 * i, "peak_memory_bytes": 4e8, "artifacts": []} for i, name in enumerate(NAMES)}
    state = {"profile": "cpu", "set": [], "data": "world", "data_name": "world", "only": None, "max_steps": None, "status": "done", "bands": True}
    artifacts.write_json(folder / "state.json", {**state, "started": 1e9, "chapters": chapters})
    metrics = {"first/steps": 100, "second/value": 0.3, "pretrain/facts": 0.957, "second/free": 12345.6, "course/seconds": 120.0}
    artifacts.write_json(folder / "metrics.json", {**metrics, "course/peak_memory_bytes": 4e8})
    line = {"chapter": "01_first", "x": [0, 500_000, 1_000_000], "x_label": "tokens", "y_label": "bits per byte"}
    curves = {"pretrain/train": {**line, "y": [6.0, 1.0, 0.5]}, "pretrain/valid": {**line, "y": [6.1, 1.1, 0.6]}, "one": {**line, "y": [2, 2, 2]}}
    artifacts.write_json(folder / "curves.json", curves)
    asked = {"Where does Garus live?": "Garus lives <b>in</b> Foxhollow & more", "Who are you?": "A model."}
    artifacts.write_json(folder / "answers.json", {"sft": asked, "pretrain": {"Where does Garus live?": "Where does Garus live? In"}})
    artifacts.write_json(folder / "machine.json", {"python": "3.12.1", "torch": "2.13.0", "processor": "A processor", "cores": 2, "memory_gb": 8.0})
    for name in NAMES:
        (folder / f"{name}.ipynb").write_text("{}")
    return folder


def change(folder, file: str, **values) -> None:
    content = json.loads((folder / file).read_text())
    content.update(values)
    artifacts.write_json(folder / file, content)


def page(folder) -> str:
    return report.write(folder).read_text()


def row_of(text: str, metric: str) -> str:
    """The line of the table that holds a metric, without tags."""
    part = next(part for part in text.split("<tr>") if re.search(rf"[>\s]{re.escape(metric)}<", part))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", part))


class Balance(HTMLParser):
    """Counts that every element is closed in order, and collects links and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.links, self.ids, self.headings = [], [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [found[key] for key in ("href", "src", "data", "action", "poster") if found.get(key)]
        self.ids += [found["id"]] if "id" in found else []
        self.headings += [int(tag[1])] if re.fullmatch(r"h\d", tag) else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_one_file_that_needs_no_network(finished):
    text = page(finished)
    parser = Balance()
    parser.feed(text)
    assert parser.open == [] and len(set(parser.ids)) == len(parser.ids)
    assert parser.headings[0] == 1 and all(b - a <= 1 for a, b in zip(parser.headings, parser.headings[1:]))
    assert all((finished / link).is_file() for link in parser.links), "a link that leads nowhere"
    assert not re.search(r"https?://|//cdn|@import|url\(|<script|<link|<iframe", text)
    assert len(text) < 200_000


def test_each_number_stands_beside_its_band(finished):
    text = page(finished)
    assert "1 to 100" in row_of(text, "first/steps") and "✓ inside" in row_of(text, "first/steps")
    assert "at least 0.5" in row_of(text, "second/value") and "✗ outside" in row_of(text, "second/value")
    facts = row_of(text, "pretrain/facts")
    assert "96%" in facts and "at least 90%" in facts and "✓ inside" in facts
    assert "12,346" in row_of(text, "second/free") and "no band" in row_of(text, "second/free")
    assert "not measured" in row_of(text, "first/never"), "an expected number that is missing must show"
    assert "at most 60 s" in row_of(text, "course/seconds") and "✗ outside" in row_of(text, "course/seconds")
    assert "6 numbers were measured; 5 have an expected band, and 3 of them lie inside. 2 lie outside." in text


@pytest.mark.parametrize("value, inside", [(1, True), (100, True), (0.999, False), (100.001, False)])
def test_the_limits_belong_to_the_band(finished, value, inside):
    change(finished, "metrics.json", **{"first/steps": value})
    assert ("✓ inside" in row_of(page(finished), "first/steps")) is inside


def test_answers_of_both_stages_stand_side_by_side_and_cannot_inject_markup(finished):
    text = page(finished)
    assert text.index("after pretraining") < text.index("after SFT")
    assert "Garus lives &lt;b&gt;in&lt;/b&gt; Foxhollow &amp; more" in text and "<b>in</b>" not in text
    assert "not asked" in text


def test_curves_are_drawn_and_described(finished):
    text = page(finished)
    assert text.count("<polyline") == 3 and text.count('role="img"') == 2
    assert "Train from 6 to 0.5; valid from 6.1 to 0.6, over 1M tokens." in text
    dashes = re.findall(r'stroke-dasharray="([^"]*)"', text)
    assert dashes[0] != dashes[1], "two curves of one drawing must differ without colour"


def test_curves_fit_into_their_frame(finished):
    for match in re.finditer(r'viewBox="0 0 (\d+) (\d+)"(.*?)</svg>', page(finished), re.S):
        width, height, body = int(match[1]), int(match[2]), match[3]
        for points in re.findall(r'points="([^"]+)"', body):
            for point in points.split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width and 0 <= y <= height


def test_what_is_special_about_a_run_is_said(finished):
    change(finished, "state.json", max_steps=2, set=["model=minimind3"], bands=False, data_name="/home/me/novels", data="/home/me/novels")
    artifacts.write_json(finished / "replaced.json", {"precision": "precision fp16 replaced by bf16: no GPU"})
    text = page(finished)
    assert "after 2 steps" in text and "Precision fp16 replaced by bf16" in text and "Text: novels." in text and "not compared" in text
    assert "--data /home/me/novels --max-steps 2 --set model=minimind3" in text
    assert "inside" not in re.sub(r"<style.*?</style>", "", text, flags=re.S).replace("lie inside", "")
    assert "that answers" not in text


def test_a_run_that_failed_says_where(finished):
    state = json.loads((finished / "state.json").read_text())
    state["status"] = "failed"
    state["chapters"]["02_second"] = {"status": "failed", "seconds": 1.0, "cell": "second-cell", "error": "ValueError: <oops>"}
    artifacts.write_json(finished / "state.json", state)
    (finished / "02_second.ipynb").unlink()
    (finished / "02_second.partial.ipynb").write_text("{}")
    text = page(finished)
    assert "stopped in chapter 02 second" in text and "second-cell" in text and "ValueError: &lt;oops&gt;" in text
    assert 'href="02_second.partial.ipynb"' in text and "--resume --name 2026-01-01-cpu" in text


def test_a_run_that_has_only_begun(finished):
    for name in ("metrics", "curves", "answers", "machine"):
        (finished / f"{name}.json").unlink()
    change(finished, "state.json", status="running", chapters={name: {"status": "waiting"} for name in NAMES})
    text = page(finished)
    assert "This run is not complete" in text and "0 of 2 chapters" in text and "not recorded" in text
    Balance().feed(text)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_light_and_dark(finished):
    """WCAG 2.1 asks for a contrast of 4.5 for text and of 3 for the lines of a drawing."""
    schemes = re.findall(r":root \{([^}]*--band[^}]*)\}", page(finished))
    assert len(schemes) == 2 and contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#999999", "#ffffff") < 4.5
    for scheme in schemes:
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", scheme))
        for text, back in [("ink", "page"), ("soft", "page"), ("soft", "panel"), ("ink", "bad-back"), ("c0", "page")]:
            assert contrast(colour[text], colour[back]) >= 4.5, (text, back)
        for mark in ("good", "bad", "none"):
            assert contrast(colour[mark], colour[f"{mark}-back"]) >= 4.5, mark
        for line in ("c0", "c1", "c2", "c3", "c4"):
            assert contrast(colour[line], colour["panel"]) >= 4.5, line  # they also colour the names of the curves
        for bar in ("bar", "bar2"):
            assert contrast(colour[bar], colour["page"]) >= 3, bar


def test_ticks_are_round_and_cover_the_curve():
    assert report.ticks(0.1, 6.4, 5) == [0, 2, 4, 6, 8]
    assert report.ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for low, high in [(3, 3), (-1e-9, 1e-9), (1e6, 5e6), (-7, 2)]:
        found = report.ticks(low, high, 5)
        assert found[0] <= low and found[-1] >= high and len(found) <= 8


def test_labels_that_would_lie_on_each_other_move_apart():
    moved = report.spread([100.0, 101.0, 50.0], 14)
    assert moved[0] == 100 and moved[1] == 114 and moved[2] == 50


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("pretrain/facts", 1.0, "100%"), ("pretrain/facts", 0.9996, "99.9%"), ("dpo/facts_lost", 0.0123, "1.2%"),
        ("x/y_bytes", 1.5e9, "1.50 GB"),
        ("course/seconds", 3900.0, "1 h 05 min"),
        ("generate/cache_speedup", 8.44, "8.4 ×"), ("a/count", 1234567.0, "1,234,567"),
        ("a/b", 0.0123456, "0.01235"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(name, value, shown):
    assert report.show_value(name, value) == shown


STAGE_VALUES = {"parameters": 1_500_000, "milliseconds": 20.0, "questions": 0.9, "facts": 0.8, "bits_per_byte": 0.25}


def add_stages(folder, **stages) -> None:
    change(folder, "metrics.json", **{f"evaluate/{key}_{name}": value for name, values in stages.items() for key, value in values.items()})


def test_all_stages_stand_in_one_table_and_one_picture(finished):
    student = STAGE_VALUES | {"parameters": 400_000, "milliseconds": 11.0, "questions": 0.62}
    add_stages(finished, pretrain=STAGE_VALUES | {"questions": 0.0}, sft=STAGE_VALUES, distill=student)
    text = page(finished)
    part = text[text.index('id="stages"') : text.index("</section>", text.index('id="stages"'))]
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", part))
    assert "after distillation 400k 11 80% 62% 0.250" in words
    assert part.count("<svg") == 2 and part.count("<path") == 6
    # Up and to the left is better: the student's mark lies left of and below the chat model's.
    marks = [tuple(map(float, re.search(r'd="M([\d.]+) ([\d.]+)m', line).groups())) for line in re.findall(r"<path[^>]*>", part)[:3]]
    base, chat, small = marks
    assert small[0] < chat[0] == base[0] and chat[1] < small[1] < base[1]


def test_one_stage_alone_or_numbers_without_questions_draw_no_picture(finished):
    add_stages(finished, pretrain=STAGE_VALUES)
    assert 'id="stages"' not in page(finished)
    without = {key: value for key, value in STAGE_VALUES.items() if key not in ("questions", "facts")}
    artifacts.write_json(finished / "metrics.json", {"course/seconds": 1.0, "course/peak_memory_bytes": 1e9})
    add_stages(finished, pretrain=without, sft=without)  # other data have no questions
    text = page(finished)
    assert 'id="stages"' in text and "<svg" not in text[text.index('id="stages"') : text.index("</section>", text.index('id="stages"'))]
