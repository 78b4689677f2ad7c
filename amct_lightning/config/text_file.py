"""Reading the text of a configuration file, and YAML as far as a configuration needs it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from amct_lightning.config.checks import found

MAX_BYTES = 64 << 20
_MOST_CHARACTERS = 2**20
_DEEPEST = 20
_SHOWN = 80


def read_text(path: str | Path, remedy: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: The file.
        remedy: What to do if there is no such file.

    Returns:
        Its text.

    Raises:
        TypeError: If ``path`` is no path.
        FileNotFoundError: If there is no such file.
        OSError: If the file cannot be read.
        ValueError: If the content is no text, or more than a configuration can be.

    Example:
        >>> read_text("none.cfg", "check the path")
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] No such config file; check the path: 'none.cfg'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"The config file must be given as a path, found {found(path)}.")
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MiB, so it is no configuration; check the path.")
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, f"No such config file; {remedy}", str(path)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error}).") from error


def parse_yaml(text: str, source: str) -> object:
    """Parse one YAML document.

    Keys and the items of lists are always text, because they are names here: ``0.10`` is a layer. Other values
    are true, false, null, integers, floats or text, as in YAML 1.2.

    Args:
        text: The text.
        source: What it is called in messages, for example the file name.

    Returns:
        The root value; an empty text is an empty mapping.

    Raises:
        ValueError: If the text is no YAML, too large or nested too deeply, has repeated keys, or uses aliases,
            merge keys or tags.

    Example:
        >>> parse_yaml("{batch_num: 2, skip_layers: [0.10, head]}", "demo.yaml")
        {'batch_num': 2, 'skip_layers': ['0.10', 'head']}
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"{source}: larger than {_MOST_CHARACTERS} characters; this is no quantization config.")
    try:
        root = _Loader(text).get_single_data()
    except _NotForConfigsError as error:
        raise ValueError(f"{source}: {error}.") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{source}: {line}not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two from absurd numbers and escapes
        raise ValueError(f"{source}: not valid YAML: {error}.") from error
    return {} if root is None else root


class _NotForConfigsError(Exception):
    """YAML that a configuration does not need; the message begins with the line."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML without aliases and tags (which can make a small text huge, or run code), merge keys and deep nesting."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute: YAML 1.1's surprises go)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def get_single_node(self) -> yaml.Node | None:
        root = self.get_node() if self.check_node() else None
        if self.check_node():
            self.get_event()
            self._refuse(self.peek_event(), "starts a second document; a config is one document")
        return root

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"aliases such as *{event.anchor[:_SHOWN]} are not supported; write the value out")
        if event.tag is not None:
            self._refuse(event, f"tags such as {event.tag[:_SHOWN]} are not supported; leave it out")
        if self._depth > _DEEPEST:
            self._refuse(event, f"nested more than {_DEEPEST} levels deep; this is no quantization config")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse(key, "a key must be a name, not a list or a mapping")
            if key.value in result:
                self._refuse(key, f"key '{key.value[:_SHOWN]}' is repeated; delete all but one")
            if key.value == "<<" and key.style is None:
                self._refuse(key, "merge keys (<<) are not supported; write the values out")
            result[key.value] = self.construct_object(value, deep=True)
        return result

    def sequence(self, node: yaml.SequenceNode) -> list[Any]:
        return [n.value if isinstance(n, yaml.ScalarNode) else self.construct_object(n, deep=True) for n in node.value]

    def _refuse(self, place: Any, problem: str) -> NoReturn:
        raise _NotForConfigsError(f"line {place.start_mark.line + 1}: {problem}")


for _tag, _pattern, _make in (
    ("bool", r"(?i:true|false)", lambda _, node: node.value.lower() == "true"),
    ("null", r"(?i:null|~|)", lambda _, node: None),
    ("int", r"[-+]?[0-9]{1,18}", lambda _, node: int(node.value)),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", lambda _, node: float(node.value)),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _make)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.sequence)
