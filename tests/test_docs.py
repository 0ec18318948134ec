"""Tests of the pages: the tests, files, commands, links and frames they name exist, and the first pages are short."""

import ast
import functools
import inspect
import pathlib
import re
import tomllib
from collections.abc import Iterator

import pytest

from simpo_pipeline.executor.run import StepRun
from simpo_pipeline.executor.step import ExecutorStep
from simpo_pipeline.job.flags import JobFlags
from simpo_pipeline.job.main import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "simpo_pipeline"
PAGES = (
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "infra/README.md"),
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))),
)
MAX_LINES = {"README.md": 200, "ARCHITECTURE.md": 200, "CONTRIBUTING.md": 120}
# Folders whose files a page may name, relative to the root of the repository or to the package.
FOLDERS = (".ci", "benchmarks", "docs", "experiments", "infra", "src", "steps", "tests")
# Suffixes of files that are part of the repository wherever a page names them. Outputs of jobs have other suffixes.
SOURCE_SUFFIXES = (".md", ".py", ".toml", ".yaml")
MAX_FRAMES = 6

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"`([^`\n]+)`")
_TEST = re.compile(r"(?:(?P<file>[\w/]+\.py)::)?(?<![\w/.])(?P<name>test_\w+)(?![\w/]|\.py)")
_PATH = re.compile(r"(?<![\w/~.:$<>-])(?:[\w.*-]+/)+[\w.*-]*|(?<![\w/~.:$<>*-])[\w-]+\.(?:py|md|toml|yaml)\b")
_PLACEHOLDER = re.compile(r"(?<![\w.])(?:[A-Z]|NAME)(?=[./_]|$)")
_PYTHON = re.compile(r"\bpython(?: -[A-Z]+)* (?:-m (?P<module>[\w.]+)|(?P<script>[\w./-]+\.py)\b)")
_UV_RUN = re.compile(r"\buv run(?: --?[\w-]+(?: (?:gpu|tpu|dev|model)\b)?+)*+ (?P<tool>\.?\w[\w./-]*)")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
_FRAME = re.compile(r"^[└─ ]*(?P<name>[\w.]+) +(?P<file>\w+/[\w/]+\.py) ", re.MULTILINE)


def code_of(text: str) -> str:
    """Return the code blocks and inline code of a page, one per line."""
    blocks = _FENCE.findall(text)
    return "\n".join([*blocks, *_INLINE_CODE.findall(_FENCE.sub("", text))])


@functools.cache
def defined_tests() -> dict[str, set[str]]:
    """Return the names of all tests, each with the files that define it."""
    files: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                files.setdefault(node.name, set()).add(str(path.relative_to(ROOT)))
    return files


@functools.cache
def source_files() -> tuple[pathlib.PurePosixPath, ...]:
    """Return the files of the repository, relative to its root."""
    files = [*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    return tuple(pathlib.PurePosixPath(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts)


def missing_tests(text: str) -> list[str]:
    """Return the tests that a page names and that do not exist, or not in the file that it names."""
    missing = []
    for match in _TEST.finditer(code_of(text)):
        files = defined_tests().get(match["name"], set())
        if not files or (match["file"] and match["file"] not in files):
            missing.append(match[0])
    return missing


def missing_paths(text: str) -> list[str]:
    """Return the paths that a page names as part of the repository and that do not exist."""
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()}
    missing = []
    for path in _PATH.findall(code_of(text)):
        pattern = _PLACEHOLDER.sub("*", path.rstrip("./"))
        if pattern.endswith(SOURCE_SUFFIXES):
            found = any(file.match(pattern) for file in source_files())
        elif "/" in path and path.split("/")[0] in (*FOLDERS, *rooms):
            found = any(any(base.glob(pattern)) for base in (ROOT, PACKAGE))
        else:
            continue
        if not found:
            missing.append(path)
    return missing


def missing_commands(text: str) -> list[str]:
    """Return the commands of a page whose script, module or tool does not exist."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tools = {re.split(r"[<>=\[]", requirement)[0] for requirement in pyproject["dependency-groups"]["dev"]}
    code, missing = code_of(text), []
    for match in _PYTHON.finditer(code):
        module, script = match["module"], match["script"]
        if script is not None and not (ROOT / script).is_file():
            missing.append(match[0])
        if module is not None and module.startswith("simpo_pipeline"):
            folder = ROOT / "src" / module.replace(".", "/")
            if not (folder / "__main__.py").is_file() and not folder.with_suffix(".py").is_file():
                missing.append(match[0])
    for match in _UV_RUN.finditer(code):
        if match["tool"] not in {"python", *tools} and not (ROOT / match["tool"]).is_file():
            missing.append(match[0])
    return missing


def broken_links(text: str, folder: pathlib.Path) -> list[str]:
    """Return the relative links of a page that lead to no file."""
    return [target for target in _LINK.findall(_FENCE.sub("", text)) if not (folder / target).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_names_exists(page):
    assert missing_tests((ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page):
    assert missing_paths((ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_shows_can_be_found(page):
    assert missing_commands((ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_of_a_page_leads_to_a_file(page):
    assert broken_links((ROOT / page).read_text(), (ROOT / page).parent) == []


@pytest.mark.parametrize("page", MAX_LINES)
def test_the_first_pages_are_short(page):
    assert len((ROOT / page).read_text().splitlines()) <= MAX_LINES[page]


def test_the_pages_name_many_tests_paths_and_commands():
    code = "\n".join(code_of((ROOT / page).read_text()) for page in PAGES)
    assert len(set(_TEST.findall(code))) > 60
    assert len(set(_PATH.findall(code))) > 100
    assert len(set(_PYTHON.findall(code))) > 5


@pytest.mark.parametrize(
    ("find", "wrong", "right"),
    [
        (missing_tests, "`test_that_nobody_wrote`", "`test_the_first_pages_are_short`"),
        (missing_tests, "`tests/test_docs.py::test_imports_go_one_way`", "`tests/test_docs.py`"),
        (missing_tests, "```\ntest_that_nobody_wrote\n```", "test_that_nobody_wrote"),
        (missing_paths, "`storage/absent.py`", "`storage/files.py: read_text`, `executor/running/commit.py`"),
        (missing_paths, "`tests/absent/`", "`tests/golden/`, `gs://tests/absent`, `~/tests/absent`"),
        (missing_paths, "`absent.py`", "`conftest.py`, `absent.jsonl`"),
        (missing_paths, "`steps/absent/NAME.py`", "`steps/NAME.py`, `experiments/configs/X.yaml`"),
        (missing_commands, "```\npython infra/absent.py --x\n```", "```\npython infra/pin.py --check\n```"),
        (missing_commands, "`python -m simpo_pipeline.absent`", "`python -m simpo_pipeline.executor gc PREFIX`"),
        (
            missing_commands,
            "`uv run --isolated --extra tpu absent .`",
            "`uv run --extra tpu pytest -n 0`, `uv run --extra gpu ...`",
        ),
    ],
)
def test_a_wrong_name_is_noticed_and_a_right_one_is_not(find, wrong, right):
    assert len(find(wrong)) == 1
    assert find(right) == []


def test_a_link_to_no_file_is_noticed():
    text = "[a](docs/absent.md) [b](ARCHITECTURE.md#rooms) [c](https://example.com/absent.md)"
    assert broken_links(text, ROOT) == ["docs/absent.md"]


def test_main_reaches_a_step_function_through_the_frames_on_the_architecture_page(tmp_path):
    (block,) = re.findall(r"^```frames\n(.*?)^```", (ROOT / "ARCHITECTURE.md").read_text(), re.MULTILINE | re.DOTALL)
    named = [(match["name"], match["file"]) for match in _FRAME.finditer(block)]
    assert len(named) == len(block.splitlines()) <= MAX_FRAMES
    stack: list[tuple[str, str]] = []

    def remember_stack(config: dict[str, str], run: StepRun) -> None:
        stack.extend(_frames())

    step = ExecutorStep("remember_stack", remember_stack, {})
    main(JobFlags(prefix=str(tmp_path), tracker="none"), steps=[step])
    frames = iter(reversed(stack))  # the outermost comes first
    assert [frame for frame in named if frame in frames] == named, "each frame after the one before it"


def _frames() -> Iterator[tuple[str, str]]:
    """Yield the name and file of each frame of the package on the stack, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        path = pathlib.Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            yield frame.f_code.co_qualname, str(path.relative_to(PACKAGE))
        frame = frame.f_back
