"""What of YAML is read, and how; anything else is refused with file and line."""

from __future__ import annotations

import pytest

from amct_lightning.config.text_file import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("~", None),
        ("12", 12),
        ("-1e-3", -0.001),
        (".5", 0.5),
        ("'12'", "12"),
        ("INT8", "INT8"),
        ("2001-01-01", "2001-01-01"),
        ("1_000", "1_000"),
        (":".join(["1"] * 10**5), ":".join(["1"] * 10**5)),
        ("[1, true, 0.10]", ["1", "true", "0.10"]),
        ("{1: {2.0: 3}}", {"1": {"2.0": 3}}),
    ],
    ids=lambda item: str(item)[:20],
)
def test_values_are_typed_and_names_are_text(text: str, value: object):
    assert parse_yaml(f"key: {text}", "my.yaml") == {"key": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2: key 'a' is repeated"),
        ("layers:\n  {x: 1, x: 2}", "line 2: key 'x' is repeated"),
        ("a: &x 1\nb: *x", r"line 2: aliases such as \*x"),
        ("a: {<<: {b: 1}}", r"line 1: merge keys \(<<\)"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: tags such as .*python"),
        ("a: b: c", "line 1: not valid YAML: mapping values"),
        ("a: [1", "line 1: not valid YAML"),
        ("{a: 1}\n---\n{b: 2}", "line 3: starts a second document"),
        ("? [1]\n: 2", "line 1: a key must be a name"),
        ("a: \x00", "not valid YAML"),
        ('"\\UFFFFFFFF": 1', "not valid YAML"),
        ("%YAML 1." + "9" * 5000 + "\n---\na", "not valid YAML"),
    ],
)
def test_other_texts_are_refused_with_file_and_line(text: str, message: str):
    with pytest.raises(ValueError, match=rf"(?s)^my\.yaml: {message}"):
        parse_yaml(text, "my.yaml")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        "{a: " * 10**5,
        "- " * 10**5,
        "\n".join(" " * depth + "a:" for depth in range(1000)),
        "a: " + "x" * 2**21,
        "a: &a [x]\n" + "\n".join(f"b{i}: &b{i} [*a, *a, *a, *a, *a, *a, *a]" for i in range(20)),
    ],
    ids=["lists", "mappings", "block lists", "indentation", "large", "aliases"],
)
def test_hostile_texts_neither_hang_nor_crash(text: str):
    with pytest.raises(ValueError, match=r"^my\.yaml: "):
        parse_yaml(text, "my.yaml")
