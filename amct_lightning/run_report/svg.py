"""A matplotlib figure as SVG inside an HTML page: coloured by CSS variables, with ids that no other figure has."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from amct_lightning.run_report.style import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """Return a figure as an ``<svg>`` element for an HTML page.

    Args:
        figure: The figure.
        name: A word that no other figure on the page has.
        alt: What the figure shows, for those who do not see it.

    Returns:
        The element; the same figure gives the same text.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())  # matplotlib's own output
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    used = {reference for element in root.iter() for reference in _references(element)}
    for element in root.iter():
        _localize(element, name, used)
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return _without_namespaces(root)


def _references(element: ElementTree.Element) -> list[str]:
    link = element.attrib.get(_XLINK, "")
    links = [link[1:]] if link.startswith("#") else []
    return links + [match for value in element.attrib.values() for match in _REFERENCE.findall(value)]


def _localize(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Prefix what is referred to with the figure's name, drop other ids, and put CSS variables for the colours."""
    identity = element.attrib.pop("id", None)
    if identity in used:
        element.set("id", f"{name}-{identity}")
    for key, value in list(element.attrib.items()):
        if key == _XLINK:
            del element.attrib[key]
            element.set("href", f"#{name}-{value[1:]}" if value.startswith("#") else value)
        else:
            themed = _themed(value) if key in ("style", "fill", "stroke") else value
            element.set(key, _REFERENCE.sub(rf"url(#{name}-\1)", themed))


def _themed(style: str) -> str:
    for colour in COLOURS:
        style = style.replace(colour.light, f"var(--{colour.name})")
    return style


def _without_namespaces(root: ElementTree.Element) -> str:
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    return ElementTree.tostring(root, encoding="unicode")
