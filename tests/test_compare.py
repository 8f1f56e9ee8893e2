"""`course compare`: which differences between runs are real, and what it says when it cannot know."""

import re
import subprocess
import sys

import pytest
from helpers_course import environment
from test_report import Balance

from course import artifacts, compare

STATE = {"profile": "cpu", "data_name": "world", "max_steps": None, "set": [], "status": "done"}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def make(runs, name, metrics, right=None, curve=None, **state):
    """A run with these metrics; `right` is 0 and 1 for the questions of evaluate/facts."""
    folder = runs / name
    artifacts.write_json(folder / "metrics.json", metrics)
    artifacts.write_json(folder / "state.json", STATE | state)
    if right is not None:
        artifacts.write_json(folder / "results.json", {"evaluate/facts": {f"q{i}": r for i, r in enumerate(right)}})
    if curve:
        line = {"chapter": "x", "x": [0, 1, 2], "y": curve, "x_label": "step", "y_label": "loss"}
        artifacts.write_json(folder / "curves.json", {"sft": line})
    return name


def differ(names, against=()):
    first, second = compare.read_all(list(names), list(against))
    return compare.differences(first, second, compare.common_metrics(first + second))


def test_equal_questions_are_paired(runs):
    """20 points apart on 100 questions, all on one side: real. Three answers apart: noise. The same share, other answers: noise too."""
    base = [1] * 60 + [0] * 40
    make(runs, "a", {"evaluate/facts": 0.6, "other/number": 2.0}, base)
    make(runs, "better", {"evaluate/facts": 0.8, "other/number": 2.0}, [1] * 80 + [0] * 20)
    make(runs, "a-little", {"evaluate/facts": 0.63, "other/number": 2.1}, [1] * 63 + [0] * 37)
    headings, table = differ(["a", "better", "a-little"])
    real, noise = table["evaluate/facts"]
    assert headings == ["B - A", "C - A"]
    assert real.verdict == "real" and real.value == pytest.approx(0.2) and real.low > 0 and real.p < 1e-5 and "100 questions" in real.how
    assert noise.verdict == "noise" and noise.p == 0.25
    equal, unknown = table["other/number"]
    assert equal.verdict == "equal" and unknown.verdict == "unknown" and unknown.low is None, "one number beside another proves nothing"


def test_pairing_sees_what_two_separate_intervals_do_not(runs):
    """Nine answers gained, none lost, of 200: the two shares alone would be noise."""
    from minimind.evaluate import wilson

    make(runs, "a", {"evaluate/facts": 0.5}, [1] * 100 + [0] * 100)
    make(runs, "b", {"evaluate/facts": 0.545}, [1] * 109 + [0] * 91)
    assert wilson(100, 200)[1] > wilson(109, 200)[0]
    assert differ(["a", "b"])[1]["evaluate/facts"][0].verdict == "real"


def test_only_questions_in_common_are_paired(runs):
    make(runs, "a", {"evaluate/facts": 0.5}, [1, 0] * 20)
    make(runs, "b", {"evaluate/facts": 0.5}, [1, 0] * 10)
    assert differ(["a", "b"])[1]["evaluate/facts"][0].how.startswith("20 questions in common")
    artifacts.write_json(runs / "b" / "results.json", {"evaluate/facts": {"another": 1}})
    found = differ(["a", "b"])[1]["evaluate/facts"][0]
    assert found.how == "no question in common" and found.low is None


def test_seeds_give_an_interval_over_runs(runs):
    for i, (a, b) in enumerate(zip((0.50, 0.52, 0.54), (0.30, 0.31, 0.33))):
        make(runs, f"a{i}", {"x/loss": a, "x/wild": (0, 5, 1)[i], "x/size": 7})
        make(runs, f"b{i}", {"x/loss": b, "x/wild": (1, 4, 2)[i], "x/size": 5})
    headings, table = differ(["a0", "a1", "a2"], ["b0", "b1", "b2"])
    assert headings == ["A - B"]
    real, wild, size = (table[name][0] for name in ("x/loss", "x/wild", "x/size"))
    assert real.value == pytest.approx(0.2067, abs=1e-3) and real.verdict == "real" and 0 < real.low < real.value < real.high
    assert wild.verdict == "noise" and size.verdict == "real" and "no spread" in size.how
    assert differ(["a0", "a1"], ["b0"])[1]["x/loss"][0].verdict == "unknown", "one run has no spread to go by"


def test_welch_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = [0.5, 0.56, 0.47, 0.6], [0.42, 0.44, 0.5]
    ours, theirs = compare.over_runs(a, b), stats.ttest_ind(a, b, equal_var=False)
    interval = theirs.confidence_interval()
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-4)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-4)
    for df in (1, 1.7, 4, 30):
        assert compare.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-4)


def test_many_tests_of_nothing_are_not_called_real():
    """With 40 equal numbers some p fall below 0.05; without Holm's correction they would be called real."""
    import random

    rng = random.Random(0)
    verdicts, uncorrected = [], 0
    for _ in range(10):
        found = [compare.over_runs([rng.gauss(0, 1) for _ in range(5)], [rng.gauss(0, 1) for _ in range(5)]) for _ in range(40)]
        compare.judge(found)
        verdicts += [d.verdict for d in found]
        uncorrected += sum(d.p < 0.05 for d in found)
    assert uncorrected > 10 and verdicts.count("real") < uncorrected / 5
    assert verdicts.count("maybe") + verdicts.count("real") == uncorrected


def test_the_page_is_one_file_with_table_and_curves(runs, capsys, tmp_path):
    make(runs, "a", {"evaluate/facts": 0.6, "pretrain/facts": 0.97}, [1] * 60 + [0] * 40, [3, 2, 1])
    make(runs, "b<i>", {"evaluate/facts": 0.9, "pretrain/facts": 0.95}, [1] * 90 + [0] * 10, [3, 1.5, 0.5], profile="gpu")
    out = tmp_path / "page.html"
    assert compare.main(arguments("a", "b<i>", "--out", str(out))) == 0
    text, page = capsys.readouterr().out, out.read_text()
    assert "+0.3 (" in text and "real" in text and "Different profiles: A cpu, B gpu" in text
    parser = Balance()
    parser.feed(page)
    assert parser.open == [] and not re.search(r"https?://|@import|url\(|<script|<link|<i>", page)
    assert page.count("<polyline") == 2 and "A ends at 1; B ends at 0.5." in page and "b&lt;i&gt;" in page
    assert "facts completed after pretraining" in page and "<td><span class=\"mark in\">real</span></td>" in page


def arguments(*words):
    import argparse

    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return parser.parse_args(words)


def test_settings_that_differ_are_said_and_not_refused(runs):
    make(runs, "a", {"x": 1.0})
    make(runs, "b", {"x": 1.0}, data_name="novels", max_steps=2, set=["world.seed=2"], status="failed")
    (runs / "alone").mkdir()
    artifacts.write_json(runs / "alone" / "metrics.json", {"x": 2.0})
    said = " ".join(compare.remarks(compare.read_all(["a", "b", "alone"], [])[0]))
    for part in ("Different data: A world, B novels", "--max-steps: A none, B 2", "B world.seed=2", "Not finished: B", "not known: C"):
        assert part in said


@pytest.mark.parametrize(
    "names, message",
    [
        (["a", "nowhere"], "nowhere: there is no such run; runs here: a, b, other"),
        (["a", "empty"], "is no run with results, it has no metrics.json"),
        (["a", "a"], "a is given twice"),
        (["a"], "give at least two"),
        (["a", "other"], "no metric is common to all of these runs .a has x; other has y."),
        (["a", "broken"], "broken.*is damaged"),
        (["a", "strange"], "expected one object, name to number"),
    ],
)
def test_what_cannot_be_compared_is_named(runs, names, message):
    make(runs, "a", {"x": 1.0})
    make(runs, "b", {"x": 1.0})
    make(runs, "other", {"y": 1.0})
    (runs / "empty").mkdir()
    for name, content in (("broken", '{"x": '), ("strange", '{"x": "one"}')):
        (runs / name).mkdir()
        if message.startswith((name, "expected")):
            (runs / name / "metrics.json").write_text(content)
    with pytest.raises(compare.CompareError, match=message):
        differ(names)


def test_a_path_serves_as_well_as_a_name(runs, tmp_path):
    make(runs, "a", {"x": 1.0})
    make(tmp_path, "elsewhere", {"x": 1.5})
    assert differ(["a", str(tmp_path / "elsewhere")])[1]["x"][0].value == 0.5


def test_the_command(runs, tmp_path):
    make(runs, "a", {"x": 1.0})
    call = lambda *words: subprocess.run(
        [sys.executable, "-m", "course", "compare", *words], env=environment(tmp_path, MINIMIND_RUNS=str(runs)), capture_output=True, text=True
    )
    shown = call("--help")
    assert shown.returncode == 0 and "examples:" in shown.stdout and "--against b1 b2 b3" in shown.stdout
    failed = call("a", "b")
    assert failed.returncode == 1 and failed.stderr.startswith("error: b: there is no such run") and "Traceback" not in failed.stderr
    make(runs, "b", {"x": 2.0})
    done = call("a", "b")
    assert done.returncode == 0 and (runs / "compare.html").is_file() and "one run each" in done.stdout


def test_results_need_a_name_for_each_question(tmp_path, monkeypatch):
    from helpers_course import fake_course

    from course.chapter import Chapter

    monkeypatch.setenv("MINIMIND_HOME", str(fake_course(tmp_path)))
    chapter = Chapter("02_second", "cpu")
    chapter.keep_results("a/b", ["q1", "q2"], [True, 0])
    assert artifacts.read_json(chapter.run / "results.json") == {"a/b": {"q1": 1, "q2": 0}}
    for questions, right in ((["q1", "q1"], [1, 1]), (["q1"], [1, 0])):
        with pytest.raises(ValueError, match="each question needs its own"):
            chapter.keep_results("a/c", questions, right)
