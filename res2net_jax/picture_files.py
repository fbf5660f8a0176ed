"""Which files of a folder are pictures, and in what order."""

import os
import re
from collections.abc import Iterator

#: What the name of a picture in a folder ends in, in any case; a file that is named itself may end as it likes.
PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".avif")


def pictures_below(folder: str, above: tuple = ()) -> Iterator[str]:
    """Pictures below ``folder``, hidden ones left out. Links to folders are followed, but not to one they lie in."""
    status = os.stat(folder)
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: natural_key(entry.name))
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            status = entry.stat()
            if (status.st_dev, status.st_ino) not in above:
                yield from pictures_below(entry.path, above)
        elif entry.name.lower().endswith(PICTURES) and (entry.is_file() or entry.is_symlink()):
            yield entry.path  # also a link to nowhere, which is met when it is read


def natural_key(name: str) -> tuple:
    """timm's order: without regard to case, runs of digits by their value; equal names by their characters."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name
