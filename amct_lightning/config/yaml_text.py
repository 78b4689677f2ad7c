"""Reading YAML text into plain objects, as far as a configuration needs YAML.

PyYAML's parser reads the text; the objects are made here. So repeated keys are refused, aliases and tags (which
can make a small text huge or run code) are not followed, nesting is limited, and a name is never taken for a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

_MOST_CHARACTERS = 2**20
_DEEPEST = 20
_SHOWN = 80
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


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
    return _Builder(source).build(_events(text, source))


def _events(text: str, source: str) -> Iterator[Any]:
    try:
        yield from yaml.parse(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{source}: {line}not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two from absurd numbers and escapes
        raise ValueError(f"{source}: not valid YAML: {error}.") from error


class _Builder:
    """Makes objects from the events of PyYAML's parser."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._line = 1
        self._root: list[Any] = []
        self._open: list[dict[str, Any] | list[Any]] = [self._root]
        self._keys: list[str | None] = [None]

    def build(self, events: Iterator[Any]) -> object:
        """Consume the events of one document and return its root value."""
        for event in events:
            self._line = event.start_mark.line + 1
            self._take(event)
        if len(self._root) > 1:
            raise self._error("starts a second document; a config is one document")
        return self._root[0] if self._root and self._root[0] is not None else {}

    def _take(self, event: Any) -> None:
        if isinstance(event, yaml.AliasEvent):
            raise self._error(f"aliases such as *{event.anchor[:_SHOWN]} are not supported; write the value out")
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self._start({} if isinstance(event, yaml.MappingStartEvent) else [], event)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            self._open.pop()
            self._keys.pop()
        elif isinstance(event, yaml.ScalarEvent):
            self._scalar(event)

    def _start(self, container: dict[str, Any] | list[Any], event: Any) -> None:
        self._refuse_tag(event)
        if len(self._open) > _DEEPEST:
            raise self._error(f"nested more than {_DEEPEST} levels deep; this is no quantization config")
        self._put(container)
        self._open.append(container)
        self._keys.append(None)

    def _scalar(self, event: Any) -> None:
        self._refuse_tag(event)
        owner = self._open[-1]
        if isinstance(owner, dict) and self._keys[-1] is None:
            if event.value in owner:
                raise self._error(f"key '{event.value[:_SHOWN]}' is repeated; delete all but one")
            if event.value == "<<" and event.style is None:
                raise self._error("merge keys (<<) are not supported; write the values out")
            self._keys[-1] = event.value
        elif event.style is not None or (isinstance(owner, list) and owner is not self._root):
            self._put(event.value)
        else:
            self._put(_plain_value(event.value))

    def _put(self, value: Any) -> None:
        owner = self._open[-1]
        if isinstance(owner, list):
            owner.append(value)
            return
        key = self._keys[-1]
        if key is None:
            raise self._error("a key must be a name, not a list or a mapping")
        owner[key] = value
        self._keys[-1] = None

    def _refuse_tag(self, event: Any) -> None:
        if event.tag is not None:
            raise self._error(f"tags such as {event.tag[:_SHOWN]} are not supported; leave it out")

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self._source}: line {self._line}: {problem}.")


def _plain_value(text: str) -> object:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
