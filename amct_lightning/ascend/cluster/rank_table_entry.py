"""Typed access to the values of a rank table; an error names the file, the key, what was found, what is allowed."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Entry:
    """A value of a JSON document together with the place where it stands.

    Attributes:
        file: The file, as the user gave it.
        key: Where the value stands, for example ``server_list[0].server_id``; empty for the whole document.
        value: The value, as ``json`` has read it.

    Example:
        >>> table = Entry("ranks.json", "", {"server_list": [{"server_id": "10.0.0.1"}]})
        >>> server = table.child("server_list").items()[0]
        >>> server.child("server_id").key, server.child("server_id").text()
        ('server_list[0].server_id', '10.0.0.1')
        >>> server.child("device")
        Traceback (most recent call last):
        ...
        ValueError: Rank table 'ranks.json', key 'server_list[0].device': it is missing. It must be there.
    """

    file: str
    key: str
    value: object

    def child(self, name: str) -> Entry:
        """The value under ``name`` of this object, which must be there.

        Args:
            name: A key of the object.

        Returns:
            The entry of that key.

        Raises:
            ValueError: If this is no object or has no such key.
        """
        found = self.optional(name)
        if found is None:
            raise rank_table_error(self.file, self._path(name), "it is missing", "It must be there.")
        return found

    def optional(self, name: str) -> Entry | None:
        """The value under ``name`` of this object, or ``None``.

        Args:
            name: A key of the object.

        Returns:
            The entry of that key; ``None`` if there is none.

        Raises:
            ValueError: If this is no object.
        """
        if not isinstance(self.value, dict):
            raise self.error("Allowed is an object, {...}.")
        return Entry(self.file, self._path(name), self.value[name]) if name in self.value else None

    def items(self) -> list[Entry]:
        """The entries of this list, which must not be empty.

        Returns:
            One entry per element.

        Raises:
            ValueError: If this is no list, or an empty one.
        """
        if not isinstance(self.value, list) or not self.value:
            raise self.error("Allowed is a list with at least one entry, [...].")
        return [Entry(self.file, f"{self.key}[{index}]", value) for index, value in enumerate(self.value)]

    def text(self) -> str:
        """This value as text: not empty, printable, without blanks around it.

        Returns:
            The text.

        Raises:
            ValueError: If it is anything else.
        """
        value = self.value
        if not isinstance(value, str) or not value.isprintable() or not value.strip() or value != value.strip():
            raise self.error("Allowed is a text in quotes, not empty and without blanks around it.")
        return value

    def number(self) -> int:
        """This value as a number of at most nine digits, written as ``"3"`` (HCCL's form) or as ``3``.

        Returns:
            The number.

        Raises:
            ValueError: If it is anything else.
        """
        value = self.value
        digits = str(value) if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else value
        if not isinstance(digits, str) or not _NUMBER.fullmatch(digits):
            raise self.error('Allowed is a whole number from 0 in quotes, for example "0".')
        return int(digits)

    def addresses(self, name: str) -> tuple[str, ...]:
        """The value under ``name`` as a list of IP addresses separated by commas; no or an empty text is none.

        Args:
            name: A key of the object, which may be missing.

        Returns:
            The addresses in their shortest form.

        Raises:
            ValueError: If one of them is no IP address.
        """
        entry = self.optional(name)
        if entry is None or entry.value == "":
            return ()
        found = [as_address(part) for part in entry.text().split(",")]
        if None in found:
            raise entry.error("Allowed is an IPv4 or IPv6 address, or several with commas between them.")
        return tuple(address for address in found if address is not None)

    def error(self, allowed: str) -> ValueError:
        """The error for this value.

        Args:
            allowed: A sentence: what is allowed, and what to do.

        Returns:
            The error, to be raised by the caller.
        """
        return rank_table_error(self.file, self.key, f"found {shown(self.value)}", allowed)

    def _path(self, name: str) -> str:
        return f"{self.key}.{name}" if self.key else name


def rank_table_error(file: str, key: str, found: str, allowed: str) -> ValueError:
    """An error in the form that all errors about rank tables have.

    Args:
        file: The file.
        key: The key within it; empty for the whole file.
        found: What was found.
        allowed: A sentence or more: what is allowed, and what to do.

    Returns:
        The error, to be raised by the caller.

    Example:
        >>> rank_table_error("ranks.json", "version", "found '3'", "Allowed is '1.0'.")
        ValueError("Rank table 'ranks.json', key 'version': found '3'. Allowed is '1.0'.")
    """
    return ValueError(f"Rank table '{file}'{f', key {key!r}' if key else ''}: {found}. {allowed}")


def as_address(text: str) -> str | None:
    """The shortest form of an IP address, or ``None`` where the text is none.

    Args:
        text: Any text.

    Returns:
        The address, so that two spellings of it compare equal.

    Example:
        >>> as_address("fe80:0::1"), as_address("node_0")
        ('fe80::1', None)
    """
    try:
        return ipaddress.ip_address(text).compressed
    except ValueError:
        return None


def shown(value: object) -> str:
    """A value for an error message: short, and safe for values of any depth.

    Args:
        value: A value of a JSON document.

    Returns:
        At most about 80 characters.

    Example:
        >>> shown({"a": 1}), shown([]), shown("x")
        ('an object', 'a list of 0 entries', "'x'")
    """
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
