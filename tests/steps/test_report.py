"""The report shows the content of its inputs, all of it as text, on a self-contained page."""

import dataclasses
import html.parser
import json
import math
from pathlib import Path
from typing import Any

import pytest

from simpo_pipeline.errors import ConfigError, DataError, StorageError
from simpo_pipeline.executor.run import Action, PlanRow, StepRun
from simpo_pipeline.processes import Processes
from simpo_pipeline.storage.output_folder import OutputFolder
from simpo_pipeline.training.evaluation import accuracy
from steps.bodies.report import fenced, markdown_cell, printable, show_number, spread
from steps.report import ReportConfig, report

HOSTILE = (
    '</div><script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)>& ```\n'
    "# Not a heading\x1b[2J\x00"
)
DIGESTS = {"train-2": "aa" * 32, "train-5": "bb" * 32}


def write_train_output(folder: Path, name: str, steps: range, **changes: Any) -> str:
    output = folder / f"{name}-123abc"
    output.mkdir()
    rows = [
        {
            "step": step,
            "loss": 1.0 / step,
            "rewards/chosen": -0.1 * step,
            "rewards/rejected": -0.2 * step,
            "rewards/margins": 0.1 * step,
            "learning_rate": 1e-5,
            "tokens": 2048,
        }
        | changes
        for step in steps
    ]
    (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"step": steps[-1], "state_digest": DIGESTS[name], "tokens": 4096, "train_seconds": 12.5}
    (output / "summary.json").write_text(json.dumps(summary))
    (output / ".executor_info").write_text(json.dumps({"name": name, "seconds": 34.5}))
    return str(output)


def write_infer_output(folder: Path, texts: list[str]) -> str:
    output = folder / "infer-128-456def"
    output.mkdir()
    rows = [
        {
            "step": 2,
            "global_prompt_index": index,
            "sample_index": 0,
            "prompt": f"Question {index}?",
            "generated_text": text,
            "generated_token_count": 7,
            "finish_reason": "stop",
        }
        for index, text in enumerate(texts)
    ]
    (output / "all_hosts_merged_of_0001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "step": 2,
        "prompts": len(rows),
        "generated_tokens": 8192,
        "tokens_per_second": 400.0,
        "finish_reasons": {"stop": 3, "length": 1},
    }
    (output / "summary.json").write_text(json.dumps(summary | {"decode_seconds": 21.5, "handoff_bytes_copied": 0}))
    return str(output)


def make_run(folder: Path, *outputs: str, processes: Processes | None = None) -> StepRun:
    rows = [
        PlanRow(Path(output).name.rpartition("-")[0], Action.RUN, "never ran <before>", Path(output).name[-6:], output)
        for output in (*outputs, str(folder / "report-789abc"))
    ]
    return StepRun(
        name="report",
        output=OutputFolder(str(folder / "report-789abc")),
        processes=processes or Processes(),
        session=None,
        plan=tuple(rows),
        replaying=False,
    )


@pytest.fixture
def m11(tmp_path: Path) -> tuple[ReportConfig, StepRun]:
    """Return inputs of the same shape as in the main job: 2 updates, generation, 5 updates."""
    train_2 = write_train_output(tmp_path, "train-2", range(1, 3))
    train_5 = write_train_output(tmp_path, "train-5", range(3, 8))
    infer = write_infer_output(tmp_path, [HOSTILE, "plain", "words", "more"])
    config = ReportConfig(
        title="M11 <b>bold</b>",
        train_outputs=(train_2, train_5),
        infer_outputs=(infer,),
        num_samples=2,
    )
    return config, make_run(tmp_path, train_2, infer, train_5)


class Page(html.parser.HTMLParser):
    """Page as a browser would see it: elements with their attributes, and text by table cell or block."""

    VOID = ("meta",)

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def written(run: StepRun, name: str) -> str:
    return Path(run.output.path, name).read_text(encoding="utf-8")


def test_the_page_shows_plan_metrics_generation_samples_timings_and_digests(m11: tuple[ReportConfig, StepRun]):
    config, run = m11
    report(config, run)
    texts = Page(written(run, "report.html")).texts
    for expected in (
        *("train-2", "infer-128", "train-5", "RUN", "never ran <before>", "123abc", config.train_outputs[0]),
        *DIGESTS.values(),
        *("margin", "0.1429", "-0.7", "34.5", "12.5", "8,192", "21.5", "finish reason: length"),
        *("Question 0?", "Question 2?", "words"),
        *("7 updates", "loss 1 to 0.1429", "8,192 tokens generated at 400 tok/s"),
    ):
        assert expected in texts, expected
    assert "plain" not in texts, "two of the four samples were requested: the first and the third"


def test_hostile_text_stays_text_in_html(m11: tuple[ReportConfig, StepRun]):
    config, run = m11
    report(config, run)
    page = Page(written(run, "report.html"))
    assert HOSTILE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd") in page.texts
    assert "M11 <b>bold</b>" in page.texts
    assert not {"script", "img", "b", "link", "iframe"} & set(page.tags)


def test_the_page_refers_to_nothing_outside_itself(m11: tuple[ReportConfig, StepRun]):
    config, run = m11
    report(config, run)
    source = written(run, "report.html")
    assert not {"src", "href", "srcset", "action", "onerror"} & {name for name, _ in Page(source).attributes}
    assert "url(" not in source
    assert "@import" not in source


def test_hostile_text_stays_in_its_block_in_markdown(m11: tuple[ReportConfig, StepRun]):
    config, run = m11
    report(config, run)
    lines = written(run, "report.md").splitlines()
    start = lines.index("````text")
    assert lines[start + 2] == "# Not a heading\ufffd[2J\ufffd"
    assert lines[start + 3] == "````"
    assert lines[0] == r"# M11 \<b\>bold\</b\>"


def test_every_table_row_of_the_markdown_has_as_many_cells_as_its_head(m11: tuple[ReportConfig, StepRun]):
    config, run = m11
    write_evaluations(config.train_outputs[0], {0: [-1.0] * 10, 2: [1.0] * 10})
    report(config, run)
    blocks = [block.splitlines() for block in written(run, "report.md").split("\n\n") if block.startswith("|")]
    assert len(blocks) == 6, "plan, timings, digests, updates, held-out pairs, generation"
    for block in blocks:
        assert len({line.count("|") - line.count(r"\|") for line in block}) == 1, block
        assert len(block) >= 3


def test_the_curves_pass_through_every_update_and_mark_the_generation(m11: tuple[ReportConfig, StepRun]):
    config, run = m11
    report(config, run)
    source = written(run, "report.html")
    page = Page(source)
    assert page.tags.count("svg") == 3, "loss, margin, rewards"
    assert page.tags.count("polyline") == 1 + 1 + 2
    assert page.tags.count("circle") == 7 * (1 + 1 + 2)
    assert source.count('class="marker"') == 3
    assert "loss at update 7: 0.142857" in page.texts


def write_evaluations(output: str, margins: dict[int, list[float]], **common: str) -> None:
    rows = [
        {
            "step": step,
            "pairs": len(values),
            "loss": 1.0 / (step + 1),
            "rewards/margins": sum(values) / len(values),
            "accuracy": dataclasses.asdict(accuracy(values)),
            "margins": values,
            **common,
        }
        for step, values in margins.items()
    ]
    Path(output, "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_held_out_accuracy_is_shown_with_its_interval_its_gain_and_its_curve(m11: tuple[ReportConfig, StepRun]):
    config, run = m11
    write_evaluations(config.train_outputs[0], {0: [-1.0] * 6 + [1.0] * 4, 2: [-1.0] * 3 + [1.0] * 7})
    write_evaluations(config.train_outputs[1], {7: [1.0] * 10})
    report(config, run)
    page = Page(written(run, "report.html"))
    for expected in (
        *("Held-out pairs", "Accuracy on held-out pairs", "held-out accuracy 0.4 to 1"),
        *("0.400 (0.168 to 0.687)", "1.000 (0.722 to 1.000)", "accuracy at update 7: 1"),
        # 6 of 10 pairs gained, none lost.
        "0.600 (0.173 to 0.827)",
    ):
        assert expected in page.texts, (expected, [text for text in page.texts if "0.6" in text])
    assert page.tags.count("svg") == 4
    assert "| 2 | 10 | 0.3333 | 0.4 | 0.700 (0.397 to 0.892) |" in written(run, "report.md")
    summary = json.loads(written(run, "summary.json"))
    assert summary["held_out_accuracy"] == dataclasses.asdict(accuracy([1.0] * 10))
    assert summary["held_out_accuracy_gain"]["value"] == 0.6
    assert summary["held_out_margin_gain"] is None, "10 pairs are too few"


@pytest.mark.parametrize("num_pairs", [10, 20])
def test_gains_are_those_of_the_same_pairs_if_a_phase_has_others(m11: tuple[ReportConfig, StepRun], num_pairs: int):
    config, run = m11
    write_evaluations(config.train_outputs[0], {0: [-1.0] * 10, 2: [1.0] * 10}, pairs_digest="one")
    half = [1.0] * (num_pairs // 2)
    write_evaluations(
        config.train_outputs[1], {4: [-1.0] * num_pairs, 7: half + [-1.0] * len(half)}, pairs_digest="two"
    )
    report(config, run)
    assert "held-out accuracy 0 to 0.5" in Page(written(run, "report.html")).texts
    assert json.loads(written(run, "summary.json"))["held_out_accuracy_gain"]["value"] == 0.5
    assert f"| 4 | {num_pairs} | 0.2 | -1 | 0.000" in written(run, "report.md")


def test_the_margin_gain_is_shown_with_its_interval(m11: tuple[ReportConfig, StepRun]):
    config, run = m11
    write_evaluations(config.train_outputs[0], {0: [-1.0] * 18 + [1.0] * 12, 2: [1.0] * 30})
    report(config, run)
    # A gain of 2 in 18 of 30 pairs: 1.2 on average, plus or minus 1.96 * 0.9965 / sqrt(30).
    assert "1.200 (0.843 to 1.557)" in Page(written(run, "report.html")).texts
    assert json.loads(written(run, "summary.json"))["held_out_margin_gain"]["value"] == pytest.approx(1.2)


def test_the_summary_has_the_figures_of_the_whole_run(m11: tuple[ReportConfig, StepRun]):
    config, run = m11
    report(config, run)
    assert json.loads(written(run, "summary.json")) == {
        "updates": 7,
        "final_loss": pytest.approx(1 / 7),
        "final_margin": pytest.approx(0.7),
        "held_out_accuracy": None,
        "held_out_accuracy_gain": None,
        "held_out_margin_gain": None,
        "state_digests": DIGESTS,
        "generated_tokens": 8192,
        "samples_shown": 2,
    }


def test_a_run_that_diverged_is_still_reported(tmp_path: Path):
    output = write_train_output(tmp_path, "train-2", range(1, 3), loss=math.nan, **{"rewards/margins": math.inf})
    config = ReportConfig(title="NaN", train_outputs=(output,))
    run = make_run(tmp_path, output)
    report(config, run)
    assert "nan" in Page(written(run, "report.html")).texts


def test_generation_alone_is_reported_without_training(tmp_path: Path):
    output = write_infer_output(tmp_path, ["a"])
    config = ReportConfig(title="Samples", infer_outputs=(output,))
    run = make_run(tmp_path, output)
    report(config, run)
    texts = Page(written(run, "report.html")).texts
    assert "Training" not in texts
    assert "Question 0?" in texts


def test_only_the_leader_writes(m11: tuple[ReportConfig, StepRun], tmp_path: Path):
    config, _ = m11
    run = make_run(tmp_path, processes=Processes(process_index=1, process_count=2))
    report(config, run)
    assert not Path(run.output.path).exists()


def test_a_train_output_without_rows_is_refused(tmp_path: Path):
    output = write_train_output(tmp_path, "train-2", range(1, 3))
    Path(output, "metrics.jsonl").write_text("")
    config = ReportConfig(title="t", train_outputs=(output,))
    with pytest.raises(DataError, match=r"metrics\.jsonl has no rows"):
        report(config, make_run(tmp_path, output))


def test_a_missing_train_output_is_named(tmp_path: Path):
    config = ReportConfig(title="t", train_outputs=(str(tmp_path / "gone"),))
    with pytest.raises(StorageError, match="gone"):
        report(config, make_run(tmp_path))


def test_an_infer_output_without_its_merged_rows_is_refused(tmp_path: Path):
    output = write_infer_output(tmp_path, ["a"])
    Path(output, "all_hosts_merged_of_0001.jsonl").unlink()
    config = ReportConfig(title="t", infer_outputs=(output,))
    with pytest.raises(DataError, match="has 0 files all_hosts_merged_of"):
        report(config, make_run(tmp_path, output))


def test_a_negative_number_of_samples_is_refused():
    with pytest.raises(ConfigError, match="num_samples is -1"):
        ReportConfig(title="t", num_samples=-1)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\u2013"),
        (7, "7"),
        (1234567, "1,234,567"),
        (0.000012345, "1.234e-05"),
        (0.5, "0.5"),
        (1234.56, "1,235"),
        (-0.123456, "-0.1235"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_formatted_for_people(value: float | None, shown: str):
    assert show_number(value) == shown


def test_samples_are_spread_evenly_and_never_more_than_there_are():
    rows = [{"i": i} for i in range(10)]
    assert [row["i"] for row in spread(rows, 4)] == [0, 2, 5, 7]
    assert spread(rows, 99) == tuple(rows)
    assert spread([], 3) == ()


def test_markdown_cells_contain_one_line_that_cannot_end_them():
    assert markdown_cell("a|b\nc <i>*d*</i>") == r"a\|b c \<i\>\*d\*\</i\>"


def test_fences_are_longer_than_any_in_the_text():
    assert fenced("````") == "`````text\n````\n`````"


def test_printable_keeps_line_breaks_and_tabs_only():
    assert printable("a\r\nb\tc\x07\x9b") == "a\nb\tc\ufffd\ufffd"
