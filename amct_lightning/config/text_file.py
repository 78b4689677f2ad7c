"""Reading the text of a configuration file, whatever its format, and YAML as far as a configuration needs it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import yaml

from amct_lightning.config.checks import found

MAX_BYTES = 64 << 20
_MOST_CHARACTERS = 2**20
_DEEPEST = 20
_SHOWN = 80
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


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
        with Path(path).expanduser().open("rb") as file:
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
        value = _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        verdict = "" if isinstance(error, _RefusedError) else "not valid YAML: "
        raise ValueError(f"{source}: {line}{verdict}{error.problem}.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two from absurd numbers and escapes
        raise ValueError(f"{source}: not valid YAML: {error}.") from error
    return {} if value is None else value


class _RefusedError(yaml.MarkedYAMLError):  # type: ignore[misc]
    def __init__(self, problem: str, place: Any) -> None:
        super().__init__(problem=problem, problem_mark=place.start_mark)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses what can make a small text huge or run code, and repeated keys; never takes a name for a number."""

    _depth = 0

    def get_single_node(self) -> Any:
        root = self.get_node() if self.check_node() else None
        if self.check_node():
            raise _RefusedError("starts a second document; a config is one document", self.get_node())
        return root

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            name = event.anchor[:_SHOWN]
            raise _RefusedError(f"aliases such as *{name} are not supported; write the value out", event)
        if event.tag is not None:
            raise _RefusedError(f"tags such as {event.tag[:_SHOWN]} are not supported; leave it out", event)
        if self._depth == _DEEPEST and not isinstance(event, yaml.ScalarEvent):
            problem = f"nested more than {_DEEPEST} levels deep; this is no quantization config"
            raise _RefusedError(problem, event)
        self.anchors.clear()  # without aliases they mean nothing, also when they are repeated
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node)
        if isinstance(node, yaml.SequenceNode):
            items = node.value
            return [item.value if isinstance(item, yaml.ScalarNode) else self.construct_object(item) for item in items]
        return node.value if node.style is not None else _plain_value(node.value)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _RefusedError("a key must be a name, not a list or a mapping", key)
            if key.value in result:
                raise _RefusedError(f"key '{key.value[:_SHOWN]}' is repeated; delete all but one", key)
            if key.value == "<<" and key.style is None:
                raise _RefusedError("merge keys (<<) are not supported; write the values out", key)
            result[key.value] = self.construct_object(value)
        return result


def _plain_value(text: str) -> object:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
