"""The comparison of two commits."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.bench.compare import BENCHMARK, PACKAGE, Pair, check_out, counts, main, resolve
from tests.benchmarks.bench.machine import ROOT
from tests.benchmarks.bench.results import Facts
from tests.benchmarks.bench.variants import FP32, OWN


def git(root: Path, *words: str) -> None:
    author = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    subprocess.run(["git", *author, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two commits of the package, the second of which has a file more, and a third state in the working tree."""
    root = tmp_path_factory.mktemp("repository")
    for name in (PACKAGE, *BENCHMARK):
        source, target = ROOT / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    git(root, "init", "--quiet")
    for name in ("first", "second"):
        (root / PACKAGE / f"{name}.py").touch()
        git(root, "add", ".")
        git(root, "commit", "--quiet", "--message", name)
        git(root, "tag", name)
    (root / PACKAGE / "third.py").touch()
    return root


@pytest.mark.parametrize(
    ("commit", "files"), [("first", ["first"]), ("second", ["first", "second"]), (".", ["first", "second", "third"])]
)
def test_a_commit_is_checked_out_with_the_benchmark_of_today(
    repository: Path, tmp_path: Path, commit: str, files: list[str]
) -> None:
    check_out(commit, tmp_path, repository)
    found = [path.stem for path in (tmp_path / PACKAGE).glob("*.py")]
    assert sorted({"first", "second", "third"}.intersection(found)) == files
    assert (tmp_path / "tests/benchmarks/bench/worker.py").exists()


def test_a_commit_is_named_with_its_hash(repository: Path) -> None:
    name = resolve("first", repository)
    assert name.startswith("first (")
    short = name.removeprefix("first (").removesuffix(")")
    assert resolve(short, repository) == short
    assert resolve(".", repository) == "the working tree"


def test_an_unknown_commit_is_refused(repository: Path) -> None:
    with pytest.raises(SystemExit, match=r"'fifth' is no commit of .*; give a branch, tag or hash, or '\.'"):
        resolve("fifth", repository)


def test_counts_say_what_has_changed() -> None:
    base = Facts(100, 0, 1000, 2000, 1000, 4000)
    assert counts(Pair("net", OWN, "", base, base)) == "the same"
    assert counts(Pair("net", OWN, "", base, Facts(80, 0, 900, 2000, 1000, 4000))) == (
        "operators 100 to 80, kept bytes 1000 to 900"
    )


def test_two_commits_take_turns(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--networks", "tiny", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    main(["first", ".", *arguments, "--variants", OWN, "composite"], repository)
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["base"].startswith("first (")
    assert content["head"] == "the working tree"
    assert [pair["variant"] for pair in content["pairs"]] == [FP32, OWN, "composite"]
    for pair in content["pairs"]:
        assert not pair["failed"]
        assert pair["base"] == pair["head"]
        [timing] = pair["timings"]
        ratio = timing["head"]["wall"]["median"] / timing["base"]["wall"]["median"]
        assert timing["ratio"]["wall"]["median"] == pytest.approx(ratio)
    assert content["pairs"][0]["timings"][0]["verdict"] == "control"
    assert "| tiny | fp32 | 1 |" in (tmp_path / "compare.md").read_text()
    assert "wall, head / base" in capsys.readouterr().out
    assert not (repository / ".git" / "worktrees").exists()
