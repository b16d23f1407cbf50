"""``certipatch checks``: what a report of a bug needs to say."""

from __future__ import annotations

import json

from ..runtime.console import stdout
from . import options as ask


def checks(as_json: ask.AsJson = False) -> None:
    """Show versions, devices, bf16, compiler and disk: what a bug report needs."""
    from ..data.named import DOWNLOADS
    from ..runtime.checks import checks as look

    found = look(DOWNLOADS)
    if as_json:
        print(json.dumps(found))
        return
    for name, what in found.items():
        stdout.print(f"{name:17} {what}", markup=False, soft_wrap=True)
