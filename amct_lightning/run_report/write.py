"""Writing the report of a run, and a picture of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from amct_lightning.files import location, write_bytes, write_text
from amct_lightning.run_report.sources import load_run


def write_report(source: str | Path, output: str | Path) -> Path:
    r"""Write the report of a run as one HTML file that needs nothing else: no network, no other file.

    Args:
        source: The folder of a run, searched with all folders below for ``metrics.csv`` (CSVLogger),
            TensorBoard's event files, ``quant_monitor.csv`` (QuantMonitor), checkpoints and records; or one checkpoint.
            Of several runs the newest is shown; what was logged by resumptions of it is joined.
        output: The file to write, ``.html``; missing folders are created, an existing file is replaced.

    Returns:
        The path of the file. The same input gives the same bytes.

    Raises:
        FileNotFoundError: If there is no such source, or nothing in it that can be shown.
        OSError: If a file cannot be read or written.
        RuntimeError: If ``source`` is a file, but no checkpoint.
        ValueError: If ``source`` is a checkpoint that was written without QuantRetrainCallback, or ``output`` is not
            named as an HTML file.
        ImportError: If matplotlib or jinja2 is not installed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "metrics.csv").write_text("epoch,step,val_acc\n0,9,0.5\n1,19,0.75\n")
        >>> report = write_report(folder, folder / "report.html")
        >>> "<dd>0.75" in report.read_text()
        True
    """
    output = _checked(output, (".html", ".htm"))
    _check_installed()
    from amct_lightning.run_report.page import page  # noqa: PLC0415  (needs what may not be installed, and takes its time)

    write_text(output, page(load_run(source)))
    return output


def write_picture(source: str | Path, output: str | Path, *, dpi: int = 140) -> Path:
    """Write an overview of a run as one PNG picture, for a README or a slide.

    Args:
        source: As for :func:`write_report`.
        output: The file to write, ``.png``.
        dpi: Dots per inch; the picture is about 11.4 inches wide.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: If there is no such source, or nothing in it that can be drawn.
        OSError: If a file cannot be read or written.
        RuntimeError: If ``source`` is a file, but no checkpoint.
        ValueError: If ``source`` is a checkpoint that was written without QuantRetrainCallback, or ``output`` is not
            named as a PNG file.
        ImportError: If matplotlib or jinja2 is not installed.
    """
    output = _checked(output, (".png",))
    _check_installed()
    from amct_lightning.run_report.overview import overview  # noqa: PLC0415  (as above)

    picture = overview(load_run(source), dpi)
    write_bytes(output, picture)
    return output


def _check_installed() -> None:
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"A report needs {' and '.join(missing)}, which is not installed. Install what it needs with: "
            "pip install 'amct-lightning[report]'."
        )


def _checked(output: str | Path, suffixes: tuple[str, ...]) -> Path:
    path = location(output)
    if isinstance(path, str):
        raise ValueError(f"'{path}' is on a remote file system; write to a file on this machine and copy it.")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"'{path}' must end in {' or '.join(suffixes)}, which is what is written to it.")
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder; give the path of a file.")
    return path
