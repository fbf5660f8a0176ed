"""Arguments that several commands have, as types."""

from pathlib import Path
from typing import Annotated

import tyro

Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="MODEL", help="A name, a checkpoint folder, or hf://user/name.", help_behavior_hint=""),
]
Inputs = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="INPUT...",
        help="Pictures, folders, wildcards in quotes, or - for a list on standard input.",
        help_behavior_hint="",
    ),
]
BatchSize = Annotated[int, tyro.conf.arg(help="Pictures to run at a time.")]
Source = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="TEXT",
        help="For a name, where to take its weights from instead of the release.",
        help_behavior_hint="",
    ),
]
CheckHash = Annotated[
    bool,
    tyro.conf.arg(help="Do not compare the source's SHA-256 with the prefix in its file name.", help_behavior_hint=""),
]
CacheFolder = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="FOLDER",
        help="Cache folder, by default $RES2NET_JAX_HOME or the platform's own.",
        help_behavior_hint="",
    ),
]
OutputFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
