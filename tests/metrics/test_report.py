"""The report page: its numbers are the run's, and no content of a run becomes markup."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import math
import shutil
import subprocess
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import UserError
from megarl.metrics import report_data, report_series
from megarl.metrics.report import write_comparison, write_report
from megarl.metrics.report_server import ReportServer
from megarl.metrics.summary import merge_steps, summarize
from megarl.run_directory import RunDirectory, to_json
from megarl.runs.provenance import append_start, describe_start, git_commit
from tools.make_glossary import glossary

HOSTILE = (
    """</script><script>document.title="pwned"</script><img src=x onerror='document.title="pwned"'><!--&lt;"""
)
GRPO = {
    "run": {"seed": 1},
    "model": {"path": "m", "dtype": "float32"},
    "rollout": {},
    "training": {"num_steps": 9},
}
SFT = {"run": {"seed": 1}, "model": {"path": "m", "dtype": "float32"}, "training": {"num_steps": 9}}


class Page(HTMLParser):
    """Elements, text by element id of its nearest ancestor with one, and the scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._in_script = False
        self.feed(text)
        self.data: dict[str, Any] = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data
        else:
            self.text += data


def make_run(
    path: Path,
    lines: list[dict[str, Any]],
    samples: dict[int, list[dict[str, Any]]] | None = None,
    config: dict[str, Any] = GRPO,
    summary: dict[str, Any] | None = None,
    evaluations: dict[int, list[dict[str, Any]]] | None = None,
) -> Page:
    with RunDirectory(path) as run:
        run.open(config)
        run.start_after(None)
        # in one go: append_metrics waits for the disk after every line
        run.metrics_path.write_text("".join(to_json(line) + "\n" for line in lines))
        for step, rows in (samples or {}).items():
            run.write_samples(step, rows)
        for step, rows in (evaluations or {}).items():
            run.write_evaluation(step, rows)
        if summary is not None:
            run.write_summary(summary)
    return Page(write_report(path).read_text())


def grpo_line(step: int, **values: float) -> dict[str, Any]:
    base = {
        "reward_mean": math.sin(step),
        "reward_std": 0.1,
        "logprob_abs_diff_max": 1e-5,
        "grad_norm": 1 / 3,
    }
    seconds = {
        "seconds": 2.0,
        "seconds_rollout": 1.5,
        "seconds_train": 0.5,
        "tokens_per_second_rollout": 100.0,
    }
    return {"step": step} | base | seconds | values


def sample(step: int, text: str = "x", **values: Any) -> dict[str, Any]:
    base = {"step": step, "prompt_index": 3, "prompt": text, "response": text, "answer": text, "reward": 1.0}
    return (
        base | {"advantage": 0.5, "finish_reason": "stop", "policy_version": 0, "info": {text: text}} | values
    )


def test_numbers_equal_those_in_metrics_jsonl(tmp_path: Path) -> None:
    lines = [{"step": 0, "accuracy": 0.125}, *(grpo_line(step) for step in range(1, 6))]
    lines.append({"step": 5, "accuracy": 0.75})  # an evaluation after the step: a second line
    lines[3]["grad_norm"] = float("nan")
    page = make_run(tmp_path, lines)
    assert page.data["steps"] == [0, 1, 2, 3, 4, 5]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("reward_mean", "logprob_abs_diff_max", "grad_norm", "seconds_rollout"):
        assert page.data["series"][name] == [None] + [line[name] for line in written[1:6]]
    assert page.data["series"]["grad_norm"][3] == "NaN"
    assert page.data["series"]["accuracy"] == [0.125, None, None, None, None, 0.75]
    assert "grad_norm is not a finite number at step 3" in page.text
    assert "12.5% → 75.0%" in page.text
    assert "+62.5 points" in page.text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run_dir = tmp_path / "<b>run"
    config = GRPO | {"model": {"path": HOSTILE, "dtype": "float32"}}
    page = make_run(
        run_dir, [{"step": 1, "reward_mean": 1.0, HOSTILE: 2.0}], {1: [sample(1, HOSTILE)]}, config
    )
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "application/json", "id": "run-data"},
        {},
    ]
    names = {tag for tag, _ in page.tags}
    assert not names & {"img", "iframe", "object", "link", "base"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    shown = page.data["samples"]["records"][0]
    assert shown == sample(1, HOSTILE)
    assert page.data["series"][HOSTILE] == [2.0]
    assert HOSTILE in page.text  # as the model path, and in config.yaml
    assert "<b>run" in page.text


def test_the_policy_admits_this_script_only_and_no_network(tmp_path: Path) -> None:
    page = make_run(tmp_path, [grpo_line(1)])
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        f"script-src 'sha256-{digest}'",
    ]
    assert not [a for _, a in page.tags if "src" in a or str(a.get("href", "#"))[:1] != "#"]


def test_headline_figures_come_from_summary_json_when_it_is_there(tmp_path: Path) -> None:
    summary = {
        "accuracy_before": 0.2,
        "accuracy_after": 0.9,
        "wall_seconds": 125.0,
        "tokens_per_second": {"rollout": 1234.0, "train": 5678.0},
        "weights_bytes_moved": 3 * 2**20,
        "logprob_abs_diff_max": 0.02,
    }
    lines = [grpo_line(step) for step in range(1, 10)]
    text = " ".join(make_run(tmp_path, lines, summary=summary).text.split())
    for figure in ("20.0% → 90.0%", "2 min 05 s", "1,234 tok/s", "5,678 tok/s", "3 MiB", "Finished"):
        assert figure in text
    assert "above the float32 limit 0.001" in text


def test_the_logprob_limit_depends_on_the_type_and_warns(tmp_path: Path) -> None:
    lines = [grpo_line(1), grpo_line(2, logprob_abs_diff_max=0.02)]
    in_fp32 = make_run(tmp_path / "a", lines)
    assert "differ by up to 0.02 (step 2; 1 steps above the limit 0.001)" in in_fp32.text
    assert in_fp32.data["difference_limit"] == 1e-3
    in_bf16 = make_run(tmp_path / "b", lines, config=GRPO | {"model": {"dtype": "bfloat16"}})
    assert "No warnings" in in_bf16.text


def test_sft_runs_have_their_own_figures(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": s, "loss": 4.0 / s, "seconds": 1.0} for s in range(1, 5)]
    lines[1]["validation_loss"], lines[3]["validation_loss"] = 2.5, 1.25
    page = make_run(tmp_path, lines, config=SFT)
    text = " ".join(page.text.split())
    assert "Validation loss2.50 → 1.25" in text
    assert "Training loss4.00 → 1.00" in text
    assert "Accuracy" not in text
    assert "Samples" not in text


def test_a_run_without_steps_still_has_a_page(tmp_path: Path) -> None:
    assert "No step has been logged yet" in make_run(tmp_path, []).text
    with pytest.raises(UserError, match="no such run directory"):
        write_report(tmp_path / "nothing")


def test_samples_are_capped_and_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "MAX_SAMPLE_BYTES", 40_000)
    samples = {step: [sample(step, "y" * 500) for _ in range(4)] for step in range(1, 31)}
    page = make_run(tmp_path, [grpo_line(step) for step in range(1, 31)], samples)
    records = page.data["samples"]["records"]
    size = sum(len(json.dumps(record, separators=(",", ":"))) for record in records)
    assert 30_000 < size <= 40_000
    steps = [record["step"] for record in records]
    assert steps == sorted(steps)
    assert {1, 30} < set(steps)
    assert (
        f"holds {len(records)} of the {4 * len(set(steps))} samples recorded at {len(set(steps))} of 30"
        in page.text
    )


def test_logprobs_give_way_before_texts_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "MAX_SAMPLE_BYTES", 8_000)
    page = make_run(tmp_path, [grpo_line(1)], {1: [sample(1, rollout_logprobs=[-0.125] * 1000)]})
    assert page.data["samples"]["records"] == [sample(1) | {"logprobs_left_out": True}]


def test_long_runs_keep_their_spikes_and_evaluations(tmp_path: Path) -> None:
    lines = [grpo_line(step) for step in range(1, 7001)]
    lines[4321]["logprob_abs_diff_max"] = 0.5
    lines[1233]["accuracy"] = 0.5
    data = make_run(tmp_path, lines).data
    assert len(data["steps"]) <= report_data.MAX_CHART_STEPS + 2
    assert {1, 4322, 1234, 7000} <= set(data["steps"])
    at = data["steps"].index(4322)
    assert data["series"]["logprob_abs_diff_max"][at] == 0.5


def test_a_damaged_samples_file_is_named_with_its_line(tmp_path: Path) -> None:
    make_run(tmp_path, [grpo_line(1)], {1: [sample(1)]})
    with open(tmp_path / "samples" / "step_1.jsonl", "a") as handle:
        handle.write("{oops\n")
    with pytest.raises(UserError, match=r"step_1\.jsonl, line 2"):
        write_report(tmp_path)


def test_lone_surrogates_and_nan_in_samples_are_survived(tmp_path: Path) -> None:
    page = make_run(tmp_path, [grpo_line(1)], {1: [sample(1, "a\ud83dz", reward=float("nan"))]})
    record = page.data["samples"]["records"][0]
    assert (record["prompt"], record["reward"]) == ("a\ud83dz", "NaN")


def test_a_thousand_steps_are_written_fast(tmp_path: Path) -> None:
    names = [f"metric_{i}" for i in range(30)]
    lines = [grpo_line(step, **{name: math.sin(step) for name in names}) for step in range(1, 1001)]
    make_run(tmp_path, lines, {step: [sample(step, "y" * 200) for _ in range(16)] for step in range(1, 101)})
    started = time.process_time()  # processor time: the machine may be busy with other things
    write_report(tmp_path)
    assert time.process_time() - started < 1.0


def test_summarize_weighs_speeds_by_time_and_merges_lines() -> None:
    steps = merge_steps(
        [
            {
                "step": 1,
                "seconds": 4.0,
                "seconds_train": 3.0,
                "tokens_per_second_train": 10.0,
                "weights_bytes_moved": 5,
            },
            {
                "step": 2,
                "seconds": 2.0,
                "seconds_train": 1.0,
                "tokens_per_second_train": 50.0,
                "weights_bytes_moved": 7,
            },
            {"step": 2, "accuracy": 0.5},
        ]
    )
    summary = summarize(steps)
    assert len(steps) == 2
    assert summary["wall_seconds"] == 6.0
    assert summary["phase_seconds"]["train"] == 4.0
    assert summary["tokens_per_second"] == {"train": (3 * 10 + 1 * 50) / 4}
    assert summary["weights_bytes_moved"] == 12
    assert summary["accuracy_after"] == 0.5
    assert "accuracy_before" not in summary  # one evaluation is no change


def test_the_glossary_is_the_page_on_metrics() -> None:
    """docs/metrics.md is the source: python tools/make_glossary.py."""
    written = json.loads((Path(report_data.__file__).parent / "page" / "glossary.json").read_text())
    assert written == glossary((Path(__file__).parents[2] / "docs" / "metrics.md").read_text())
    assert written["lr"] == "learning rate of the step"
    assert written["critic_lr"] == written["lr"]


def test_other_axes_and_the_trainers_flops() -> None:
    steps: list[dict[str, Any]] = [
        {"step": 0, "accuracy": 0.5, "seconds": 900.0},
        {"step": 1, "num_tokens": 10, "seconds": 1800.0, "tokens_per_second_train": 1e6},
        {"step": 2, "num_tokens": 30, "seconds": 3600.0},
    ]
    assert report_series.x_axes(steps, 8) == {
        "samples": [0.0, 8.0, 16.0],
        "tokens": [0.0, 10.0, 40.0],
        "hours": [0.25, 0.75, 1.75],
    }
    assert report_series.x_axes([{"step": 1}], None) == {}
    start = {"active_parameters": 7_000_000_000, "device": "NVIDIA H200", "num_ranks": 2}
    report_series.add_training_rate(steps, start)
    assert steps[1]["train_tflops"] == pytest.approx(42_000)  # 6 x 7e9 x 1e6 / 1e12
    assert steps[1]["train_mfu"] == pytest.approx(42_000 / (2 * 989))
    assert "train_tflops" not in steps[0] | steps[2]


def test_the_best_step_is_the_first_of_equals_in_the_metrics_own_direction() -> None:
    def best(name: str, values: list[float]) -> Any:
        return report_series.best_step([{"step": 10 * i, name: value} for i, value in enumerate(values)])

    assert best("accuracy", [0.1, 0.5, 0.5, 0.25]) == report_series.Best("accuracy", 10, 0.5, 0.25)
    assert best("validation_loss", [3.0, 1.0, 2.0]) == report_series.Best("validation_loss", 10, 1.0, 2.0)
    assert best("accuracy", [0.5]) is None
    assert best("reward_mean", [0.5, 0.6]) is None


def test_what_a_run_was_made_of_is_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, [grpo_line(1)])
    monkeypatch.setattr("megarl.platform.device_name", lambda: "cpu")
    start = describe_start(2, 1000, {"parameters": 2**20, "kv_cache": 3 * 2**30})
    start |= {"command": "megarl grpo <b>", "device": "NVIDIA A100"}
    append_start(tmp_path / "provenance.jsonl", start)
    append_start(tmp_path / "provenance.jsonl", start)
    (tmp_path / "inputs.json").write_text(
        json.dumps({"package torch": {"version": "9.8"}, "data.train.path": {"a.jsonl": {"sha256": "beef"}}})
    )
    page = Page(write_report(tmp_path).read_text())
    text = " ".join(page.text.split())
    for shown in (
        "megarl grpo <b>",
        "(start 2 of the run)",
        "NVIDIA A100",
        "torch9.8",
        "sha256 beef",
        "KV cache3 GiB",
    ):
        assert shown in text
    with (tmp_path / "provenance.jsonl").open("a") as handle:
        handle.write("{oops\n")
    with pytest.raises(UserError, match=r"provenance\.jsonl, line 3"):
        write_report(tmp_path)


def test_measured_memory_stands_beside_the_plan(tmp_path: Path) -> None:
    measured = {"parameters": 2.0, "optimizer": 4.0, "activations": 1.5, "engine_kv_cache": 0.5}
    lines = [grpo_line(1), grpo_line(2, **{f"memory_{name}_gib": size for name, size in measured.items()})]
    make_run(tmp_path, [*lines, {"step": 2, "accuracy": 0.5}])
    (tmp_path / "provenance.jsonl").write_text(json.dumps({"memory_bytes": {"parameters": 2**30}}) + "\n")
    for rank, size in enumerate((2, 3)):
        memory = {"parameters": size * 2**30, "resident": 2**40}
        row = {"step": 2, "start": 0, "seconds": 1, "spans": [], "memory": memory}
        (tmp_path / "timeline").mkdir(exist_ok=True)
        (tmp_path / "timeline" / f"rank_0000{rank}.jsonl").write_text(to_json(row) + "\n")
    text = Page(write_report(tmp_path).read_text()).text
    table = text[text.index("Memory by part") :].split("The plan counts")[0]
    rows = ("parameters1 GiB2 GiB3 GiB", "optimizer–4 GiB–", "activations and buffers–1.5 GiB–")
    for row in (*rows, "KV cache–512 MiB–", "sum1 GiB8 GiB3 GiB"):
        assert row in table


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None

    def git(*arguments: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *name, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_commit(tmp_path) == commit
    (tmp_path / "new").write_text("not of the checkout")
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit} + changes"


def test_a_fall_of_the_accuracy_is_told(tmp_path: Path) -> None:
    def text(name: str, *accuracies: float) -> str:
        lines = [{"step": i, "accuracy": value} for i, value in enumerate(accuracies)]
        return make_run(tmp_path / name, lines).text

    assert "Held-out accuracy fell from 80.0% at step 1 to 70.0%" in text("a", 0.1, 0.8, 0.75, 0.7)
    assert "No warnings" in text("b", 0.1, 0.8, 0.5, 0.76)
    assert "No warnings" in text("c", 0.5, 0.1)


def test_runs_are_compared_by_settings_and_results(tmp_path: Path) -> None:
    one, two = (GRPO | {"optimizer": {"lr": rate}, "run": {"dir": f"runs/{rate}"}} for rate in (0.1, 0.2))
    make_run(tmp_path / "a", [grpo_line(1, accuracy=0.25)], config=one)
    make_run(tmp_path / "b", [grpo_line(1, accuracy=0.5), grpo_line(2)], config=two | {"lora": {"rank": 8}})
    path = write_comparison([tmp_path / "a", tmp_path / "b"])
    assert path == tmp_path / "a" / "compare.html"
    page = Page(path.read_text())
    text = " ".join(page.text.split())
    assert "0.10.2accuracy0.2500.500 (+0.25)" in text
    assert "seconds2.002.00 (+0)optimizer.lr0.10.2lora.rank–8" in text
    [other] = page.data["others"]
    assert (other["name"], other["steps"], other["series"]["accuracy"]) == ("0.2", [1, 2], [0.5, None])
    assert other["axes"]["hours"] == pytest.approx([2 / 3600, 4 / 3600])


def test_the_server_answers_with_the_page_to_this_machine_alone(tmp_path: Path) -> None:
    make_run(tmp_path, [grpo_line(1)])
    server = ReportServer([tmp_path])
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def get(path: str, host: str = "localhost") -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()

    try:
        status, text = get("/")
        assert status == 200
        assert Page(text).data["version"] == get("/version")[1]
        assert "connect-src 'self'" in text
        with (tmp_path / "metrics.jsonl").open("a") as handle:
            handle.write(to_json(grpo_line(2)) + "\n")
        assert Page(text).data["version"] != get("/version")[1]
        assert get("/../metrics.jsonl")[0] == get("/metrics.jsonl")[0] == 404
        assert get("/", host="evil.example")[0] == 403
        (tmp_path / "summary.json").write_text("[]")
        assert get("/") == (500, f"{tmp_path / 'summary.json'}: not a JSON object")
    finally:
        server.shutdown()
        server.server_close()
