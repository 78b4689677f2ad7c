"""What the README shows is copied into an empty folder and run; the Chinese README is in step with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import nn

from amct_lightning import QuantRecord
from amct_lightning.config import load_config

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CHINESE = ROOT / "README.zh-CN.md"

BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# One process for all commands of a document: starting one for each would take most of the time.
DRIVER = """
import json, runpy, sys
from amct_lightning.cli import main
sys.path.insert(0, "")
for program, *arguments in json.loads(sys.argv.pop()):
    print("$", program, *arguments, flush=True)
    if program == "python":
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        assert program == "amct-lightning", f"{program} is not known to the test"
        status = main(arguments)
        assert status == 0, f"{arguments}: exit status {status}"
"""


@dataclass
class Document:
    """The code blocks of a Markdown file that have a mark.

    ``<!-- file: NAME -->`` is written to a file, the lines of ``<!-- runs -->`` are run as commands, in this order, and
    ``<!-- printed -->`` must have been printed by then.
    """

    files: dict[str, str] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)
    printed: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, *paths: Path) -> Document:
        document = cls()
        for path in paths:
            for block in BLOCK.finditer(path.read_text(encoding="utf-8")):
                document._add(block["mark"] or "", block["text"], path)
        return document

    def _add(self, mark: str, text: str, path: Path) -> None:
        if mark.startswith("file: "):
            self.files[mark.removeprefix("file: ")] = text
        elif mark == "runs":
            lines = [line.split("  #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
            self.commands += [line.split() for line in lines if line]
        elif mark == "printed":
            self.printed.append(text)
        else:
            assert not mark or mark.startswith("--8<--"), f"{path}: unknown mark '{mark}'"

    def run(self, folder: Path) -> str:
        """Write the files, run the commands and return what they printed."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        finished = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(self.commands)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=False,
            timeout=280,
            env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        )
        assert finished.returncode == 0, finished.stdout[-3000:]
        return finished.stdout


def plain_lines(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.replace("\r", "\n").splitlines())


def blocks(path: Path) -> list[tuple[str, str]]:
    """Return marks and texts of all code blocks, without comments, which are in the language of the document."""
    found = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [(block["mark"] or "", re.sub(r" *# .*", "", block["text"])) for block in found]


def without_code(path: Path) -> str:
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All that the README has to be run, in the order of the page, in one folder."""
    folder = tmp_path_factory.mktemp("readme")
    return folder, Document.read(README).run(folder)


def test_what_it_says_is_printed_is_printed(session: tuple[Path, str]) -> None:
    printed = plain_lines(session[1])
    expected = Document.read(README).printed
    assert expected
    for text in expected:
        assert plain_lines(text) in printed


def test_the_runs_leave_the_files_that_it_names(session: tuple[Path, str]) -> None:
    folder = session[0]
    assert "<svg" in (folder / "report.html").read_text(encoding="utf-8")
    run = folder / "runs" / "digits" / "version_0"
    assert {"metrics.csv", "quant_monitor.csv", "config.yaml"} <= {file.name for file in run.iterdir()}
    [checkpoint] = run.glob("checkpoints/*.ckpt")
    beside = QuantRecord.load(checkpoint.with_suffix(".record.txt"))
    assert [(name, layer.wts_type) for name, layer in beside.items()] == [
        ("net.0", "INT8"),
        ("net.3", "INT4"),
        ("net.7", "INT8"),
    ]


def test_the_script_without_lightning_writes_its_record(session: tuple[Path, str]) -> None:
    assert list(QuantRecord.load(session[0] / "record.txt")) == ["0", "4"]


def test_the_yaml_choices(session: tuple[Path, str]) -> None:
    layers = {
        "stem": nn.Conv2d(3, 8, 3),
        "up": nn.ConvTranspose2d(8, 8, 2),
        "blocks.0.fc1": nn.Linear(8, 8),
        "blocks.0.fc2": nn.Linear(8, 8),
        "head": nn.Linear(8, 2),
    }
    config = load_config(session[0] / "choices.yaml").resolve(layers)
    assert config.batch_num == 2
    widths = {
        name: (layer.retrain_data_config.num_bits, layer.retrain_weight_config.num_bits)
        for name, layer in config.items()
        if layer.retrain_enable
    }
    assert widths == {"stem": (8, 8), "blocks.0.fc1": (16, 8), "blocks.0.fc2": (8, 4)}


class TestTheChineseReadme:
    """It says the same, so all that is not prose is the same."""

    def test_has_the_same_code(self) -> None:
        assert blocks(CHINESE) == blocks(README)

    def test_has_the_same_headings_and_tables(self) -> None:
        def shape(path: Path) -> list[str]:
            lines = without_code(path).splitlines()
            return [re.match(r"#+|\|", line)[0] for line in lines if re.match(r"#+ |\|", line)]  # type: ignore[index]

        assert shape(CHINESE) == shape(README)

    def test_has_the_same_links(self) -> None:
        def links(path: Path) -> list[str]:
            other = {README.name: CHINESE.name}
            found = (other.get(link, link) for link in LINK.findall(without_code(path)))
            return [link.replace("docs/zh/", "docs/") for link in found if not link.startswith("#")]

        assert links(CHINESE) == links(README)

    @pytest.mark.parametrize("path", [README, CHINESE], ids=lambda path: path.name)
    def test_has_a_contents_line_with_all_of_its_sections(self, path: Path) -> None:
        text = without_code(path)
        anchors = [anchor(title) for title in re.findall(r"^## (.+)$", text, flags=re.MULTILINE)]
        inner = [link[1:] for link in LINK.findall(text) if link.startswith("#")]
        assert inner[: len(anchors)] == anchors
        assert set(inner) <= set(anchors)


def anchor(title: str) -> str:
    """The name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
