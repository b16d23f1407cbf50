"""Every number of the paper's tables stands in the recipes, once, and is shown.

The tables are read from the design papers, which lie beside a working copy and not in the repository.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from certipatch.reproduce.plan import plan
from certipatch.reproduce.recipe import read_recipe
from certipatch.reproduce.tables import collect, markdown

PAPER = Path(__file__).parents[3] / "shared" / "PAPER_TABLES.md"
TABLES = ("table1", "table2", "table3", "tableA1")
MODELS = {
    "ResNetV2-50x1": "resnetv2_50x1_bit",
    "ViT-B/16": "vit_base_patch16_224",
    "ConvNeXt-T": "convnext_tiny",
}
DEFENSES = {
    "IBP": "ibp",
    "CBN": "clipped-bagnet",
    "DS": "ds",
    "PG-BN": "patchguard-bagnet",
    "PG-DS": "patchguard-ds",
    "BagCert": "bagcert",
    "Smoothed ViT-B": "smoothed-vit",
}
PATCHES = {"0.4 %": "14", "2.4 %": "35", "1 %": "1%", "2 %": "2%", "3 %": "3%"}


def rows_below(title):
    """The cells of the first table below a title, a list for each line."""
    text = PAPER.read_text().partition(f"{title}\n")[2]
    lines = [line for line in re.split(r"\n#", text)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def name(data):
    return data.lower().replace("-", "")


def columns_of_table_1():
    data, columns = "", []
    for head in rows_below("### k=3")[0][1:]:
        *of, number, percent = head.split()
        data = name(of[0]) if of else data
        columns.append((data, PATCHES[f"{number} {percent}"]))
    return columns


def numbers(cell):
    """(clean or None, certified) of a printed cell; None for a dash."""
    parts = [part.strip() for part in cell.split("/")]
    if parts[-1] == "-":
        return None
    return (float(parts[0]) if len(parts) == 2 else None, float(parts[-1]))


def printed():
    """(where, numbers) of each printed cell, as they come; ``where`` as in a recipe."""
    columns = columns_of_table_1()
    for row, *cells in rows_below("### The comparators")[1:]:
        for (data, patch), cell in zip(columns, cells, strict=True):
            yield (DEFENSES[row], data, "", "", patch, None), numbers(cell)
    for k in (3, 6):
        for row, *cells in rows_below(f"### k={k}")[1:]:
            model, strategy = row.split()
            for (data, patch), cell in zip(columns, cells, strict=True):
                yield ("patchcleanser", data, MODELS[model], strategy, patch, k), numbers(cell)
    for row, *cells in rows_below("## Table 2: clean / robust, 2.4 %")[1:]:
        model, strategy = row.split()
        for (data, k), cell in zip(product(("cifar100", "svhn"), (3, 6)), cells, strict=True):
            yield ("patchcleanser", data, MODELS[model], strategy, "35", k), numbers(cell)
    for title, model in strategies_compared():
        head, *rows = rows_below(title)
        for strategy, _, *cells in rows:
            for column, cell in zip(head[2:], cells, strict=True):
                data, k = column.split(" k=")
                patch = "3%" if "Net" in data else "35"
                yield ("patchcleanser", name(data), MODELS[model], strategy, patch, int(k)), numbers(cell)


def strategies_compared():
    for line in PAPER.read_text().splitlines():
        if line.startswith(("## Table 3", "## Table A1")):
            yield line, "ViT-B/16" if "A1" in line else "ResNetV2-50x1"


needs_the_paper = pytest.mark.skipif(not PAPER.is_file(), reason="the paper's tables are not at hand")


@needs_the_paper
def test_every_number_of_the_paper_is_in_the_recipes_once():
    """A cell that two tables print (with the same number, as this shows too) stands in one recipe."""
    ours = [value for table in TABLES for value in read_recipe(table).paper]
    stated = {value.cell: (value.clean_accuracy, value.certified_robust_accuracy) for value in ours}
    assert len(stated) == len(ours) == 358
    seen = set()
    for where, found in printed():
        if found is None:
            assert where not in stated
            continue
        clean, certified = stated[where]
        assert certified == found[1]
        assert found[0] in (None, clean)
        seen.add(where)
    assert seen == set(stated)


@needs_the_paper
@pytest.mark.parametrize(("table", "of"), [("table3", 0), ("tableA1", 1)])
def test_the_passes_of_the_search_are_the_papers(table, of):
    title = list(strategies_compared())[of][0]
    printed = {row[0]: re.match(r"\d+", row[1]) for row in rows_below(title)[1:]}
    expected = {row: int(found.group()) for row, found in printed.items() if found}
    assert read_recipe(table).search_passes == expected


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_which_nothing_was_run_shows_the_papers_numbers(table, tmp_path):
    recipe = read_recipe(table)
    text = markdown(recipe, collect(recipe, plan(recipe), tmp_path))
    cells = [cell.strip() for line in text.splitlines() for cell in line.strip("|").split("|")]
    for value in recipe.paper:
        assert cells.count(str(value)) >= [str(other) for other in recipe.paper].count(str(value))
    for strategy, passes in recipe.search_passes.items():
        assert any(
            line.startswith(f"| {strategy} ") and f"| {passes} |" in line for line in text.splitlines()
        )


def test_the_comparators_stand_in_table_1(tmp_path):
    recipe = read_recipe("table1")
    text = markdown(recipe, collect(recipe, plan(recipe), tmp_path))
    row = (
        "| clipped-bagnet | 94.9 / 74.6 | 94.9 / 60.9 | 94.9 / 45.9 | 49.5 / 13.4 | 49.5 / 7.1 | 49.5 / 3.1 |"
    )
    assert row in text
    assert "| smoothed-vit |  |  |  | 73.2 / 43.0 |" in text
