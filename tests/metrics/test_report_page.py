"""The report page in a browser: what it draws, and what a click does."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megarl.metrics.report import write_comparison, write_report
from megarl.metrics.report_server import ReportServer
from megarl.metrics.timeline import TimelineWriter
from megarl.run_directory import RunDirectory
from tests.metrics.test_report import GRPO, HOSTILE, grpo_line, make_run, sample
from tools.browser import Browser, is_installed

pytestmark = pytest.mark.skipif(not is_installed(), reason="no chromium and chromedriver to open the page in")

STEPS = 30
CONFIG = GRPO | {
    "training": {"num_steps": STEPS},
    "rollout": {"num_prompts_per_step": 2, "num_generations_per_prompt": 4},
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        # What a reader has chosen is remembered for the tab: here for one page.
        browser.devtools("Page.addScriptToEvaluateOnNewDocument", source="sessionStorage.clear()")
        yield browser


def line(step: int) -> dict[str, Any]:
    loss = math.cos(step)
    return grpo_line(
        step,
        loss=loss,
        policy_loss=loss,
        advantage_mean=-loss,
        clip_fraction=0.0,
        num_tokens=100,
        grad_norm=10.0**-step,
        seconds_rollout=4.0 if step == 12 else 1.5,
        **({"accuracy": 0.9 if step == 20 else step / 100} if step % 10 == 0 else {}),
    )


def drawn(step: int, problem: int, number: int) -> dict[str, Any]:
    """Four samples of a problem: of problem 1 with equal rewards."""
    reward = float(number % 2) if problem == 0 else 0.0
    count = number + 1
    return sample(step, f"answer {number}") | {
        "prompt": f"State the final answer to the following question: what is {problem} plus {step}?",
        "prompt_index": 10 * step + problem,
        "reward": reward,
        "advantage": reward - 0.5 if problem == 0 else 0.0,
        "finish_reason": "length" if number == 3 else "stop",
        "num_response_tokens": count,
        "response_tokens": [f"t{i}" for i in range(count)],
        "rollout_logprobs": [-0.5] * count,
        "trainer_logprobs": [-0.5 + 0.25 * i for i in range(count)],
        "entropy": [0.125] * count,
    }


def answers(step: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt": f"problem {i}",
            "response": f"said {i}",
            "answer": str(i),
            "correct": i < step / 10,
        }
        for i in range(4)
    ]


def write_lanes(folder: Path, num_ranks: int) -> None:
    """Of every step: rank 7 trains for 3 s, rank N for 1 + N/100 s, and then all exchange gradients."""
    folder.mkdir(parents=True)
    for rank in range(num_ranks):
        worked = 3.0 if rank == 7 else 1 + rank / 100
        spans = [(0, "rollout" if rank == 0 else "wait", 0.0, 1.0), (0, "train", 1.0, 4.0)]
        spans.append((1, "gradient_reduction", 1 + worked, 4.0))
        writer = TimelineWriter(folder, rank, num_ranks, after=-1)
        for step in range(1, STEPS + 1):
            writer.write(step, {"start": 5.0 * step, "seconds": 5.0, "spans": spans})
        writer.close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "run"
    samples = {
        step: [drawn(step, problem, number) for problem in range(2) for number in range(4)]
        for step in (5, 30)
    }
    lines = [line(step) for step in range(1, STEPS + 1)]
    write_lanes(path / "timeline", 12)
    counted = [{"step": step, "values": [0, 1], "counts": [384 - step, step]} for step in range(1, STEPS + 1)]
    make_run(path, lines, samples, CONFIG, evaluations={10: answers(10), 20: answers(20)})
    (path / "rewards.jsonl").write_text("".join(json.dumps(each) + "\n" for each in counted))
    write_report(path)
    return path


@pytest.fixture
def page(browser: Browser, run_dir: Path) -> Browser:
    """The report, as nobody has touched it yet."""
    browser.open((run_dir / "report.html").as_uri())
    return browser


def chart(page: Browser, title: str) -> str:
    """Return the selector of a chart."""
    script = """
        for (const node of document.querySelectorAll("#looked-at")) node.removeAttribute("id");
        const is = (node) => node.querySelector("h4").textContent.startsWith(arguments[0]);
        [...document.querySelectorAll("figure.chart")].find(is).id = "looked-at";
    """
    page.run(script, title)
    return "#looked-at"


def x_labels(page: Browser, selector: str) -> list[str]:
    return page.texts(f'{selector} svg text[text-anchor="middle"]')


def test_it_runs_nothing_of_a_run(browser: Browser, tmp_path: Path) -> None:
    lines = [grpo_line(step, accuracy=0.1 * step, **{HOSTILE: float(step)}) for step in range(1, 8)]
    logprobs = {"rollout_logprobs": [-0.1, -2.0], "response_tokens": ["<i>", HOSTILE]}
    wrong = [{"step": 7, "prompt": HOSTILE, "response": HOSTILE, "answer": HOSTILE, "correct": False}]
    make_run(tmp_path / "run", lines, {7: [sample(7, HOSTILE, **logprobs)]}, evaluations={7: wrong})
    browser.open((tmp_path / "run" / "report.html").as_uri())
    browser.choose('select[aria-label="Show tokens by"]', "engine's probability")
    assert browser.run("return document.title") == "run · MegaRL"
    assert (browser.count("script"), browser.count("img"), browser.count("iframe")) == (2, 0, 0)
    charts = browser.run(
        'return [...document.querySelectorAll(".plot")].map((node) => node.getAttribute("aria-label"))'
    )
    assert "Accuracy: accuracy from 10% to 70%" in charts
    assert f"{HOSTILE}: {HOSTILE} from 1 to 7" in charts
    assert browser.count(".plot svg") == len(charts)
    tokens = [str(title) for title in browser.attributes(".token", "title")]
    assert [text.splitlines()[0] for text in tokens] == ['token 1: "<i>"', f"token 2: {json.dumps(HOSTILE)}"]
    assert "p = 0.1353" in tokens[1]


def test_what_says_nothing_new_has_no_chart(page: Browser) -> None:
    titles = page.texts("figure.chart h4")
    assert any(title.startswith("Loss") for title in titles)
    assert not [title for title in titles if title.startswith(("Policy loss", "Advantage", "Clipped"))]
    assert sorted(page.texts(".folded li")) == [
        "Advantage: equal to minus loss",
        "Clipped tokens: always 0%",
        "Logprob difference: always 1.00e-5",
        "Policy loss: equal to loss",
        "Throughput: always 100",
        "Tokens per step: always 100",
    ]


def test_zoom_axis_and_log(page: Browser) -> None:
    selector = chart(page, "Gradient norm")
    ticks = x_labels(page, selector)
    assert ticks[-1] == "30"
    page.drag(f"{selector} .plot", 0.5, 0.9)
    zoomed = [int(text) for text in x_labels(page, selector)]
    assert 12 <= zoomed[0] < zoomed[-1] <= 29
    page.click("#reset-zoom")
    assert x_labels(page, selector) == ticks
    page.choose("#x-axis", "samples")
    assert int(x_labels(page, selector)[-1]) > 200, "240 samples"
    page.choose("#x-axis", "tokens")
    assert x_labels(page, selector)[-1] == "3,000"
    page.click(f"{selector} button.tiny")
    assert page.texts(f'{selector} svg text[text-anchor="end"]')[:2] == ["1e-30", "1e-24"]
    [path] = page.attributes(f"{selector} svg g path", "d")
    heights = [float(point.split()[1]) for point in re.split("[ML]", str(path))[1:]]
    falls = [after - before for before, after in itertools.pairwise(heights)]
    assert len(falls) == STEPS - 1
    assert falls == pytest.approx([falls[0]] * len(falls), abs=0.11), "powers of ten are a straight line"
    assert falls[0] > 3


def test_smoothing_starts_off_and_leaves_times_alone(page: Browser) -> None:
    assert page.texts("#smoothing-value") == ["off"]
    script = """
        const slider = document.getElementById("smoothing");
        slider.value = "0.9";
        slider.dispatchEvent(new Event("input"));
    """
    times = chart(page, "Time per step")
    path = "return [...document.querySelectorAll(arguments[0])].map((node) => node.getAttribute('d'))"
    before = page.run(path, f"{times} svg path")
    page.run(script)
    assert page.run(path, f"{chart(page, 'Time per step')} svg path") == before
    assert page.count(f"{chart(page, 'Loss')} svg path") == 2, "the raw curve and the smoothed one"


def test_best_step_and_meanings(page: Browser) -> None:
    assert "best 90.0% at step 20" in page.texts(".figures")[0]
    assert page.texts(".best-text") == ["best 90% at step 20"]
    assert page.count("circle.best") == 1
    terms = page.attributes(".legend .term", "title")
    assert "grad_norm: norm of the whole gradient, before clipping" in terms


def test_from_a_point_to_its_samples_and_filters(page: Browser) -> None:
    shown = "select[aria-label=Step]"
    assert page.run("return document.querySelector(arguments[0]).value", shown) == "30"
    page.drag(f"{chart(page, 'Reward')} .plot", 0.2, 0.2)
    assert page.run("return document.querySelector(arguments[0]).value", shown) == "5"
    assert page.texts(".group-head > :first-child") == ["… 0 plus 5?", "… 1 plus 5?"]
    assert page.texts(".group-head .strip")[0].split() == ["0", "1", "0", "1"]
    count = ".tools > .soft"
    assert page.texts(count)[-1].startswith("8 of 16") or "8 of 16" in page.texts(count)
    page.click(".filters summary")
    page.choose('select[aria-label="Group spread"]', "different")
    assert "4 of 16" in page.texts(count)
    page.choose('select[aria-label="Finish reason"]', "length")
    assert "1 of 16" in page.texts(count)
    page.type('input[aria-label="Lowest reward"]', "2")
    assert "0 of 16" in page.texts(count)
    page.click_button("Clear filters")
    assert "8 of 16" in page.texts(count)
    page.type("input[aria-label=Search]", "plus 30")
    assert "0 of 16" in page.texts(count)
    page.click_button("8 in all steps")
    assert "8 of 16" in page.texts(count)
    assert {text.split(" · ")[0] for text in page.texts(".row .meta")} == {"step 30"}


def test_tokens_by_trainer_and_engine(page: Browser) -> None:
    page.click(".list .row:nth-of-type(4)")
    page.choose('select[aria-label="Show tokens by"]', "trainer − engine")
    assert page.texts(".token") == ["t0", "t1", "t2", "t3"]
    styles = [str(style) for style in page.attributes(".token", "style")]
    strengths = [int(re.findall(r"([0-9]+)%", style)[0]) for style in styles]
    assert strengths == [0, 25, 50, 75], "in proportion to the differences 0, 0.25, 0.5 and 0.75"
    page.click(".token:nth-child(3)")
    assert page.texts(".readout") == [
        'token 3: "t2" · engine: logprob -0.5, p = 0.6065 · trainer: logprob 0, difference 0.5 · '
        "entropy 0.125 nats · advantage 0.5"
    ]
    by_position = [node for node in page.texts("figure.bars h4") if node.startswith("Logprob difference")]
    assert by_position
    titles = page.attributes(".sample-charts .column", "title")
    assert "tokens 3: 0.5, 4 tokens" in titles
    assert {"0: 6", "1: 2"} <= set(titles), "the rewards of step 30"


def test_answers_of_evaluations(page: Browser) -> None:
    assert page.texts('select[aria-label="Evaluated step"] option') == ["Step 10", "Step 20 (best)"]
    assert page.texts(".answer summary .pill") == ["right", "right", "wrong", "wrong"]
    page.choose("select[aria-label=Answers]", "wrong")
    page.click(".answer summary")
    assert page.texts(".answer[open] .text") == ["problem 2", "said 2", "2"]


def test_the_slowest_step_is_found(page: Browser) -> None:
    page.click_button("Slowest step")
    [marked] = page.texts(".marked-row")
    assert marked.split() == ["12", "4.5", "s"]
    assert page.attributes(".marked-row i", "title") == ["step 12, rollout: 4 s", "step 12, train: 0.5 s"]


def test_rewards_of_all_samples_of_a_range_of_steps(page: Browser) -> None:
    titles = page.attributes("#rewards .column", "title")
    assert titles == ["0: 11,055", "1: 465"], "of 30 steps of 384 samples"
    script = """
        const [from, to] = document.querySelectorAll("#rewards input");
        from.value = "9"; to.value = "10";
        to.dispatchEvent(new Event("input"));
    """
    page.run(script)
    assert page.attributes("#rewards .column", "title") == ["0: 747", "1: 21"]
    assert page.texts("#rewards h4 small") == ["768 samples"]
    assert page.texts("#rewards .tools > .soft")[-1] == "steps 10 to 11, all samples"


def test_the_slowest_rank_is_found(page: Browser) -> None:
    assert page.texts(".rank-row > :first-child") == ["rank 7, slowest", "rank 6, median", "rank 0, fastest"]
    assert page.texts(".rank-row > :last-child") == ["3 s", "1.06 s", "1 s"], "without rollouts and waits"
    page.choose('select[aria-label="Another rank"]', "3")
    assert "rank 3" in page.texts(".rank-row > :first-child")
    titles = page.attributes('[data-rank="3"] i', "title")
    assert titles == ["rank 3, wait: 1 s", "rank 3, train: 3 s", "rank 3, train, gradient reduction: 1.97 s"]
    styles = page.attributes('[data-rank="3"] .waits', "style")
    assert styles == ["left: 0%; width: 20%;", "left: 40.6%; width: 39.4%;"]
    page.click(".timeline-row:nth-child(1)")
    chosen = page.run("return document.querySelector('#rank-timeline select').value")
    assert chosen == page.texts(".timeline-row:nth-child(1) > :first-child")[0]


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (390, "light"), (1440, "dark")])
def test_nothing_is_wider_than_the_window(browser: Browser, run_dir: Path, width: int, scheme: str) -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.devtools("Emulation.setDeviceMetricsOverride", **size)
    browser.use_scheme(scheme)
    try:
        browser.open((run_dir / "report.html").as_uri())
        assert browser.run("return document.documentElement.scrollWidth") <= width
        colour = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colour[4:-1].split(","))) < 200) == (scheme == "dark")
    finally:
        browser.devtools("Emulation.setDeviceMetricsOverride", **size | {"width": 1440, "height": 1000})
        browser.use_scheme("light")


def test_another_run_is_drawn_beside_it(browser: Browser, run_dir: Path, tmp_path: Path) -> None:
    lines = [line(step) | {"loss": 2.0, "clip_fraction": 0.5} for step in range(1, 2 * STEPS + 1)]
    make_run(tmp_path / "other", lines, config=CONFIG)
    browser.open(write_comparison([run_dir, tmp_path / "other"]).as_uri())
    selector = chart(browser, "Loss")
    assert x_labels(browser, selector)[-1] == "60"
    assert browser.count(f"{selector} path.other") == 1
    assert browser.texts(".runs span") == [" run", " other"]
    assert " / 2" in browser.texts(f"{selector} .legend b")[0]
    titles = browser.texts("figure.chart h4")
    assert any(title.startswith("Clipped") for title in titles), "constant in either, and not the same"
    assert not any(title.startswith("Tokens per step") for title in titles)


def test_a_served_page_follows_the_run(browser: Browser, run_dir: Path, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run") as run:
        run.open(CONFIG)
        run.start_after(None)
        run.append_metrics(1, line(1))
        server = ReportServer([run.path])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            browser.open(server.url)
            assert "Step 1 of 30" in browser.texts(".badge")
            run.append_metrics(2, line(2))
            deadline = time.monotonic() + 30
            while "Step 2 of 30" not in browser.texts(".badge"):
                assert time.monotonic() < deadline, "the page did not load itself again"
                time.sleep(0.1)
        finally:
            server.shutdown()
            server.server_close()
