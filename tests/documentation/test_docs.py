"""The documentation builds without a warning, its code runs, its links lead somewhere, all public names are in it."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import amct_lightning
from tests.documentation.test_readme import (
    BLOCK,
    CHINESE,
    LINK,
    README,
    ROOT,
    Document,
    anchor,
    blocks,
    plain_lines,
    without_code,
)

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [README, CHINESE, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]


def in_order_of_the_navigation() -> list[Path]:
    nav = re.search(r"^nav:\n(.*)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert nav

    def leaves(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        children = node.values() if isinstance(node, dict) else node
        return [leaf for child in children for leaf in leaves(child)]  # type: ignore[attr-defined]

    return [DOCS / leaf for leaf in leaves(yaml.safe_load(nav[1]))]


def messages_of_the_package() -> list[str]:
    """All texts in the source of the package; what is filled in when it runs is a line break."""

    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) or "\n" for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None

    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "amct_lightning").rglob("*.py"))
    return [found for tree in trees for node in ast.walk(tree) if (found := text(node))]


class External(HTMLParser):
    """Collects what a browser would fetch from elsewhere when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        is_fetched = tag in ("script", "img", "iframe", "source") or (
            tag == "link" and values.get("rel") != "canonical"
        )
        target = (values.get("src") or values.get("href") or "") if is_fetched else ""
        if re.match(r"(https?:)?//", target):
            self.fetched.append(target or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    if find_spec("mkdocstrings") is None:
        pytest.fail("The documentation cannot be built. Install what it needs with: pip install -e '.[docs]'")
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
        timeout=200,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert finished.returncode == 0, finished.stdout[-3000:]
    return folder


def test_it_builds_without_a_warning(site: Path) -> None:
    assert {page.relative_to(DOCS).with_suffix(".html") for page in PAGES} <= {
        page.relative_to(site) for page in site.rglob("*.html")
    }


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        parser = External()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.fetched == [], page


def test_every_public_name_has_its_docstring_on_a_page(site: Path) -> None:
    shown = {
        identifier
        for page in (site / "api").glob("*.html")
        for identifier in re.findall(r'id="(amct_lightning\.\w+)"', page.read_text(encoding="utf-8"))
    }
    assert {f"amct_lightning.{name}" for name in amct_lightning.__all__} <= shown


def test_docstrings_are_shown_without_markup_that_markdown_does_not_know(site: Path) -> None:
    for page in (site / "api").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r":(class|func|meth|attr):", text), page
        assert "Example:" not in text, page


def test_definition_lists_are_lists(site: Path) -> None:
    terms = re.findall(r"<dt>(.+?)</dt>", (site / "monitor.html").read_text(encoding="utf-8"))
    assert terms == ["SQNR", "Clipped (saturation)", "Levels used (utilisation)", "Drift"]
    for page in site.rglob("*.html"):
        assert not re.search(r"<p>[^<]*\n: ", page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("因子", "zh/schedule.html"),
        ("校准", "zh/schedule.html"),
        ("漂移", "zh/monitor.html"),
        ("信噪比", "zh/cli.html"),
        ("通配符", "zh/configuration.html"),
        ("发散", "zh/troubleshooting.html"),
        ("集合通信", "zh/atlas.html"),
    ],
)
def test_chinese_words_are_found_by_the_search(site: Path, word: str, page: str) -> None:
    """As the theme looks: it cuts a query into words of the index, and takes words that begin with one of them."""
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert "zh" in index["config"]["lang"]  # others throw Chinese characters away
    found = {
        entry["location"].partition("#")[0]
        for entry in index["docs"]
        if any(
            token and (token.startswith(word) or (len(token) > 1 and word.startswith(token)))
            for token in re.split(index["config"]["separator"], entry["title"] + "\u200b" + entry["text"])
        )
    }
    assert page in found


def test_what_the_search_shows_is_the_text_of_the_page(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    title = {entry["location"]: entry["title"].replace("\u200b", "") for entry in index["docs"]}
    assert title["zh/schedule.html"] == "调度"
    assert title["zh/configuration.html#记录文件"] == "记录文件"


def test_no_line_of_code_is_longer_than_the_pages_are_wide() -> None:
    """``extra.css`` makes the text of blocks so small that 124 characters fit on a screen of 1280 pixels."""
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            assert all(len(line) <= 124 for line in block["text"].splitlines()), (page, block["text"])


@pytest.mark.parametrize("name", ["configuration.md", "deploy.md", "monitor.md", "troubleshooting.md"])
def test_the_chinese_page_has_the_same_code_and_the_same_tables(name: str) -> None:
    def shape(page: Path) -> list[str]:
        lines = without_code(page).splitlines()
        return [re.match(r"#+|\||:", line)[0] for line in lines if re.match(r"#+ |\||: ", line)]  # type: ignore[index]

    english, chinese = DOCS / name, DOCS / "zh" / name
    assert [text for _, text in blocks(chinese)] == [text for _, text in blocks(english)]
    assert shape(chinese) == shape(english)


def test_the_chinese_page_explains_the_same_error_messages() -> None:
    def explained(page: Path) -> list[list[str]]:
        return [re.findall("`([^`]+)`", row) for row in re.findall(r"^\| (`.*?) \|", page.read_text(), re.MULTILINE)]

    assert explained(DOCS / "zh" / "troubleshooting.md") == explained(DOCS / "troubleshooting.md")


def test_all_pages_are_in_the_navigation() -> None:
    assert sorted(in_order_of_the_navigation()) == PAGES


def test_the_code_in_the_pages_runs_and_prints_what_they_say(tmp_path: Path) -> None:
    basis, pages = Document.read(README), Document.read(*in_order_of_the_navigation())
    pages.files = {**basis.files, **pages.files}
    printed = plain_lines(pages.run(tmp_path))
    assert pages.printed
    for text in pages.printed:
        assert plain_lines(text) in printed


@pytest.mark.parametrize("text", [README, CHINESE, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_name_of_every_file_is_told(text: Path) -> None:
    """Marks are not shown to readers."""
    told = without_code(text)
    assert [name for name in Document.read(text).files if f"`{name}`" not in told] == []


def test_every_script_in_the_pages_is_run() -> None:
    for text in [README, *PAGES]:
        document = Document.read(text)
        run = {word for command in document.commands for word in command}
        assert {name for name in document.files if name.endswith(".py")} - {"my_module.py"} <= run, text


def test_the_error_messages_that_are_explained_exist() -> None:
    tables = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").partition("## Error messages")[2]
    explained = [
        quoted for row in re.findall(r"^\| (`.*?) \|", tables, re.MULTILINE) for quoted in re.findall("`([^`]+)`", row)
    ]
    assert len(explained) > 30
    messages = messages_of_the_package()
    for quoted in explained:
        pattern = re.compile(".*".join(map(re.escape, quoted.split("..."))), re.DOTALL)
        assert any(pattern.search(message) for message in messages), quoted


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(text: Path) -> None:
    for link in LINK.findall(without_code(text)):
        target, _, name = link.partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (text.parent / target) if target else text
        assert file.exists(), link
        if name and file.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", without_code(file), flags=re.MULTILINE)
            assert name in [anchor(title) for title in titles], link
