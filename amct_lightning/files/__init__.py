"""Files here and on remote file systems: where they are, and writing them whole."""

from amct_lightning.files.atomic import replacing
from amct_lightning.files.locations import (
    Location,
    atomic_path,
    beside,
    check_writable,
    is_file,
    location,
    make_parent,
    numbered,
    read_bytes,
    remove,
    write_bytes,
    write_text,
)

__all__ = [
    "Location",
    "atomic_path",
    "beside",
    "check_writable",
    "is_file",
    "location",
    "make_parent",
    "numbered",
    "read_bytes",
    "remove",
    "replacing",
    "write_bytes",
    "write_text",
]
