"""The paper's own numbers as Markdown: of its comparators, and of what has not been run here."""

from __future__ import annotations

from collections.abc import Iterable

from ..training.strategies import STRATEGIES
from .recipe import PATCHCLEANSER, Published, Recipe

COMPARATORS = (
    "Clean / certified robust in %, as the paper prints them. They were published elsewhere, with other "
    "networks, and partly with other images and patches counted in another way (docs/comparators.md)."
)


def grid(corner: str, columns: list[str], values: Iterable[tuple[str, str, Published]]) -> list[str]:
    """A table of (row, column, value), its rows in the order in which they first occur."""
    cells = {(row, column): value for row, column, value in values}
    rows = list(dict.fromkeys(row for row, _ in cells))
    lines = [[corner, *columns]]
    lines += [[row, *(str(cells.get((row, column), "")) for column in columns)] for row in rows]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return [head, "|" + "---|" * (1 + len(columns)), *body, ""]


def comparators(recipe: Recipe) -> list[str]:
    """The section of the comparators that the paper has numbers of; nothing without any."""
    values = [value for value in recipe.published.values() if value.defense != PATCHCLEANSER]
    if not values:
        return []
    columns = [f"{setup.data} {_percent(patch)}" for setup in recipe.setup for patch in setup.patches]
    table = grid("defense", columns, [(v.defense, f"{v.data} {_percent(v.patch)}", v) for v in values])
    return ["## The paper's comparators", "", COMPARATORS, "", *table]


def search_passes(recipe: Recipe) -> list[str]:
    """The section on what the search of each strategy costs, where the paper counts it."""
    if not recipe.search_passes:
        return []
    masks = recipe.setup[0].train_masks
    head = ["| strategy | ours | the paper's |", "|---|---|---|"]
    lines = [
        f"| {name} | {STRATEGIES[name].passes(masks)} | {passes} |"
        for name, passes in recipe.search_passes.items()
    ]
    return ["## Forward passes of the search for one image", "", *head, *lines, ""]


def not_run(place: str, values: list[tuple[str, int, Published | None]]) -> list[str]:
    """What the paper has of one data set, model and patch, of which nothing was run: (row, k, value) each."""
    known = [(row, f"k={k}", value) for row, k, value in values if value]
    return [
        f"- {place}",
        "",
        *(grid("the paper's", sorted({k for _, k, _ in known}), known) if known else []),
    ]


def _percent(patch: str) -> str:
    """A patch as the paper names it: 14 and 35 pixels of 224 are 0.4 and 2.4 %."""
    return {"14": "0.4%", "35": "2.4%"}.get(patch, patch)
