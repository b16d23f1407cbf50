"""Figures for papers: what they show is what the summaries say, and what cannot be shown is said in a
line."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from certipatch.certification.certify import certify
from certipatch.geometry.masks import MaskSet
from certipatch.geometry.patch import Window
from certipatch.models.runs import open_run
from certipatch.records.experiment import MaskedCertification
from certipatch.records.manifest import Manifest
from certipatch.records.read import Folder, read_folder
from certipatch.report.certification import Summary, summarize
from certipatch.report.figures.masks import draw_panels, geometry, panels_of
from certipatch.report.figures.paper import _names, draw_comparisons
from certipatch.report.figures.style import STYLE, save
from certipatch.report.shares import Share
from certipatch.runtime.devices import make_fabric
from certipatch.training.strategies import STRATEGIES
from inputs import typed, write_photos
from invented import certification

SIZE = (32, 32)


def certified(
    strategy: str,
    patch: int | tuple[int, int],
    k: int,
    count: int,
    *,
    images: int = 200,
    arch: str = "small-cnn",
    weights: str = "",
    **changes: Any,
) -> Summary:
    height, width = (patch, patch) if isinstance(patch, int) else patch
    experiment: dict[str, Any] = {
        "model": {"arch": arch},
        "weights_sha256": weights or f"{strategy} {arch}",
        "precision": "32-true",
        "device": "cpu",
        "trained": {"strategy": strategy, "epochs": 3, "seed": 0},
        "masks": {
            "image_size": list(SIZE),
            "patch_size": [height, width],
            "masks_per_axis": k,
            "windows": [],
        },
        "data": {"fingerprint": "digits", "sample": "pixels", "images": images},
    }
    for key, value in changes.items():
        where, _, name = key.rpartition("__")
        (experiment[where] if where else experiment)[name] = value
    shares = {
        f"{name}_accuracy": Share(n, images)
        for name, n in (("vanilla", 190), ("clean", 180), ("certified_robust", count))
    }
    folder = Path(f"{strategy}-{height}x{width}-k{k}")
    checked = MaskedCertification.model_validate(experiment)
    manifest = Manifest(folder, "certify", checked, experiment, finished=None, files={})
    return Summary(
        Folder(folder, manifest, []),
        **shares,
        unreadable=0,
        passes=1000,
        complete=True,
    )


def shown(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """The points of each line by its label in the legend."""
    (axes,) = figure.axes
    return {
        str(bars.get_label()): [tuple(point) for point in bars.lines[0].get_xydata().tolist()]
        for bars in axes.containers
    }


def reach(figure: Figure, label: str) -> list[tuple[float, float]]:
    """From where to where the intervals of a line reach, along the axis of shares."""
    (bars,) = (bars for bars in figure.axes[0].containers if bars.get_label() == label)
    segments = bars.lines[2][0].get_segments()
    along = 1 if segments[0][0][0] == segments[0][1][0] else 0
    return [(start[along], end[along]) for start, end in segments]


def percent(share: Share) -> tuple[float, float]:
    return tuple(pytest.approx(100 * end) for end in share.interval)  # type: ignore[return-value]


GRID = [
    certified(strategy, patch, k, 20 * k - 10 * patch + (100 if strategy == "greedy-fine" else 50))
    for strategy, patch, k in product(("greedy-fine", "random-cutout"), (3, 5), (2, 3))
]


def test_lines_show_the_summaries():
    figures, notes = draw_comparisons(GRID)
    assert notes == [
        "skipped places: needs a run that was certified by place, against one patch (certify --places)"
    ]
    assert set(figures) == {
        *(f"certified-against-patch-k{k}" for k in (2, 3)),
        *(f"certified-against-k-{p}x{p}" for p in (3, 5)),
        *(f"strategies-{p}x{p}-k{k}" for p in (3, 5) for k in (2, 3)),
    }
    for k in (2, 3):
        figure = figures[f"certified-against-patch-k{k}"]
        assert shown(figure) == {
            name: [(p, (20 * k - 10 * p + more) / 2) for p in (3, 5)]
            for name, more in (("greedy-fine", 100), ("random-cutout", 50))
        }
        assert reach(figure, "greedy-fine") == [percent(Share(20 * k - 10 * p + 100, 200)) for p in (3, 5)]
        assert figure.axes[0].get_title() == f"k={k}, 200 images"
    figure = figures["certified-against-k-5x5"]
    assert shown(figure)["random-cutout"] == [(2, 20), (3, 30)]
    assert figure.axes[0].get_title() == "patch 5x5 in 32x32, 200 images"
    looks = [
        (bars.lines[0].get_color(), bars.lines[0].get_marker(), bars.lines[0].get_linestyle())
        for bars in figure.axes[0].containers
    ]
    assert all(one != other for a, b in pairwise(looks) for one, other in zip(a, b, strict=True)), (
        "told apart without colour too"
    )


def test_strategies_beside_each_other():
    figure = draw_comparisons(GRID)[0]["strategies-3x3-k2"]
    found = {label: [x for x, _ in points] for label, points in shown(figure).items()}
    assert found == {"vanilla": [95, 95], "clean": [90, 90], "certified robust": [55, 30]}
    assert reach(figure, "certified robust") == [percent(Share(n, 200)) for n in (110, 60)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "greedy-fine",
        "random-cutout",
    ]


def test_the_mean_map_of_proven_places(tmp_path: Path):
    """Each pixel of the map is counted by hand: the records whose proven masks hide a patch there."""
    folder = read_folder(certification(tmp_path / "by-place", places=True, strategy="greedy-fine", epochs=3))
    plain = read_folder(certification(tmp_path / "plain", strategy="greedy-fine", epochs=3))
    figures, notes = draw_comparisons([summarize(folder), summarize(plain)])
    assert not any(note.startswith("skipped places") for note in notes)
    axes, bar = figures["places-5x5-k3"].axes
    (image,) = axes.get_images()
    height, width = SIZE
    expected = np.zeros((height - 4, width - 4))
    least = summarize(folder).min_margin
    for (top, left), record in product(np.ndindex(*expected.shape), folder.records):
        rows = np.flatnonzero([bit == "1" for bit in record.proven or ""])
        held = [row for row, margin in zip(rows, record.proven_margins or (), strict=True) if margin >= least]
        windows = [folder.manifest.certification.windows[row][0] for row in held]
        expected[top, left] += any(
            y <= top and x <= left and top + 5 <= y + h and left + 5 <= x + w for y, x, h, w in windows
        )
    assert len(folder.records) == 60
    assert 0 < expected.min() < expected.max()
    np.testing.assert_allclose(image.get_array(), 100 * expected / 60, rtol=1e-6)
    # A patch of 5 pixels at the top left corner has its centre in pixel 2, which reaches from 2 to 3.
    assert image.get_extent() == [2, 30, 30, 2]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, width), (height, 0))
    assert "images proven there" in bar.get_ylabel()
    assert f"{summarize(folder).certified_share_of_places.percent:.1f} % of places" in axes.get_title()


def test_patches_that_are_not_square_by_their_area():
    figure = draw_comparisons([certified("greedy-fine", patch, 3, 100) for patch in ((4, 8), (8, 8))])[0][
        "certified-against-patch-k3"
    ]
    assert [x for x, _ in shown(figure)["greedy-fine"]] == [3.125, 6.25]
    assert "area" in figure.axes[0].get_xlabel()


def test_names_say_what_differs():
    def names(*summaries: Summary) -> list[str]:
        return list(_names(list(summaries)).values())

    one = certified("greedy-fine", 5, 3, 100)
    assert names(one) == ["greedy-fine"]
    assert names(one, certified("greedy-fine", 5, 3, 90, arch="vit")) == [
        "greedy-fine, small-cnn",
        "greedy-fine, vit",
    ]
    seed = certified("greedy-fine", 5, 3, 90, weights="abcdefgh", trained__seed=1)
    assert names(one, seed) == ["greedy-fine, seed 0", "greedy-fine, seed 1"]
    assert names(one, certified("greedy-fine", 5, 3, 90, weights="abcdefgh")) == [
        "greedy-fine (greedy)",
        "greedy-fine (abcdef)",
    ]
    untrained = certified("", 5, 3, 90, trained=None)
    assert names(one, untrained) == ["greedy-fine, 3 epochs, seed 0", "not fine-tuned"]
    challenger = certified("greedy-fine", 5, 3, 90, inference="challenger")
    assert names(one, challenger) == ["greedy-fine, double masking", "greedy-fine, challenger masking"]


def test_only_comparable_runs_are_drawn_and_the_rest_is_named():
    first = certified("greedy-fine", 5, 3, 100)
    unfinished = Summary(**{**vars(certified("random-fine", 5, 3, 90)), "complete": False})
    elsewhere = certified("random-both", 5, 3, 90, data__fingerprint="others")
    larger = certified("grid-fine", 5, 3, 90, masks__image_size=[64, 64])
    figures, notes = draw_comparisons([first, unfinished, elsewhere, larger])
    assert figures == {}
    assert notes == [
        "left out: random-fine-5x5-k3 is not complete; continue it with certify --resume",
        "left out: random-both-5x5-k3 is of other images than greedy-fine-5x5-k3, or of another size",
        "left out: grid-fine-5x5-k3 is of other images than greedy-fine-5x5-k3, or of another size",
        "skipped certified-against-patch: needs one model certified for two patch sizes with the same k "
        "(certify --patch 1%,2%,3%)",
        "skipped certified-against-k: needs one model certified for two k against the same patch (certify "
        "--masks-per-axis 3,6)",
        "skipped strategies: needs two models certified against the same patch with the same k",
        "skipped places: needs a run that was certified by place, against one patch (certify --places)",
    ]
    # Another shape besides, or two patches, is another threat and not another size.
    shapes = certified("greedy-fine", 3, 3, 100, masks__other_patch_sizes=[[2, 4]])
    two = certified("greedy-fine", 3, 3, 100, masks__patches=2)
    assert draw_comparisons([first, shapes, two])[0] == {}


HOSTILE = "greedy-$x_{very}^long$-<b>&name</b>"


def test_files(tmp_path: Path):
    """As wide as a column, outlined, nothing cut off, and the same bytes each time."""
    summaries = [
        certified(f"{HOSTILE}-{i}", patch, k, 100, arch="a_model." * 2 ** (i + 1))
        for i, patch, k in [*product(range(8), (3, 5), (2,)), (0, 3, 3)]
    ]
    figures, _ = draw_comparisons(summaries)
    assert set(figures) == {
        "certified-against-patch-k2",
        "certified-against-k-3x3",
        "strategies-3x3-k2",
        "strategies-5x5-k2",
    }
    paths = save(figures, tmp_path / "new" / "folder")
    assert paths == [
        tmp_path / "new" / "folder" / f"{name}.{ending}" for name in figures for ending in ("svg", "png")
    ]
    for svg, png in zip(paths[::2], paths[1::2], strict=True):
        root = ElementTree.parse(svg).getroot()
        assert float(root.attrib["width"].removesuffix("pt")) == pytest.approx(3.3 * 72)
        assert not [tag for tag in root.iter() if tag.tag.endswith("}text")]
        assert b"dc:date" not in svg.read_bytes()
        with Image.open(png) as image:
            assert image.width == 990
    again = save(draw_comparisons(summaries)[0], tmp_path / "again")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    for name, figure in figures.items():
        with mpl.rc_context(STYLE):
            figure.draw_without_rendering()
        page = figure.bbox
        for text in figure.findobj(Text):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent()
                assert page.x0 <= box.x0 <= box.x1 <= page.x1 + 1, (name, text.get_text())
                assert page.y0 <= box.y0 <= box.y1 <= page.y1 + 1, (name, text.get_text())


def rectangles(axes: Any) -> list[tuple[float, float, float, float]]:
    return [(r.get_y(), r.get_x(), r.get_height(), r.get_width()) for r in axes.patches]


def test_geometry_of_masks():
    masks = MaskSet.covering(image_size=(32, 40), patch_size=(5, 7), masks_per_axis=3)
    fine, coarse = (
        {(w.top, w.left, w.height, w.width) for (w,) in each.windows} for each in (masks, masks.coarsen()[0])
    )
    figure = draw_panels(None, masks.image_size, geometry(masks), "a caption")
    panels = {
        axes.get_title().split("\n")[0] + axes.get_title().split("\n")[1][:6]: axes
        for axes in figure.axes
        if axes.get_title()
    }
    for title, axes in panels.items():
        assert axes.get_xlim() == (0, 40), title
        assert axes.get_ylim() == (32, 0), title
    assert rectangles(panels["a patch5x7 of"])[0][2:] == (5, 7)
    assert set(rectangles(panels["fine set9 mask"])[:-1]) == fine
    assert set(rectangles(panels["coarse set4 mask"])[:-1]) == coarse
    assert set(rectangles(panels["random-fine"])[:-1]) <= fine
    assert set(rectangles(panels["random-coarse"])[:-1]) <= coarse
    assert {r[2:] for r in rectangles(panels["random-cutout"])[:-1]} == {(18, 23)}
    assert figure.get_supxlabel() == "a caption"


def test_what_each_strategy_hides():
    copies = {
        "vanilla": [[]],
        "random-both": [[Window(0, 1, 2, 3)], [Window(4, 5, 6, 7), Window(-2, 0, 4, 4)]],
    }
    figure = draw_panels(None, SIZE, panels_of(copies))
    drawn = {axes.get_title(): rectangles(axes)[:-1] for axes in figure.axes if axes.get_title()}
    assert drawn == {
        "vanilla\n": [],
        "random-both\ncopy 1 of 2": [(0, 1, 2, 3)],
        "random-both\ncopy 2 of 2": [(4, 5, 6, 7), (-2, 0, 4, 4)],
    }


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory, trained: Path, photos: Path) -> Path:
    """The trained run on photos against two patches with two k."""
    from certipatch.data.load import load_source

    opened, source = open_run(trained), load_source(str(photos))
    out = tmp_path_factory.mktemp("certificates")
    for patch, k in product((5, 16), (2, 3)):
        masks = MaskSet.covering(image_size=SIZE, patch_size=(patch, patch), masks_per_axis=k)
        certify(opened, source, masks, out / masks.name, fabric=make_fabric(device="cpu"), data=str(photos))
    return out


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What :func:`draw_panels` was given."""
    given, draw = [], draw_panels
    monkeypatch.setattr(
        "certipatch.report.figures.write.draw_panels",
        lambda *arguments: given.append(arguments) or draw(*arguments),
    )
    return given


def test_report_writes_figures(cli, certificates: Path, tmp_path: Path, drawn: list[tuple[Any, ...]]):
    done = cli("report", certificates, "--figures", tmp_path / "f")
    assert done.code == 0, done.err
    names = [
        "certified-against-patch-k2",
        "certified-against-patch-k3",
        "certified-against-k-16x16",
        "certified-against-k-5x5",
        "masks",
    ]
    assert [line for line in done.out.splitlines() if line.startswith("figure: ")] == [
        f"figure: {tmp_path}/f/{name}.{ending}" for name in names for ending in ("svg", "png")
    ]
    assert sorted(path.stem for path in (tmp_path / "f").iterdir()) == sorted(2 * names)
    assert done.err.splitlines() == [
        "skipped strategies: needs two models certified against the same patch with the same k",
        "skipped places: needs a run that was certified by place, against one patch (certify --places)",
        "masks: drawn at random; --model RUN draws what each search finds, --data on an image",
    ]
    ((image, size, _, caption),) = drawn
    assert (image, size) == (None, SIZE)
    assert "on a blank image" in caption
    assert "depends on the model" in caption

    quiet = cli("report", certificates, "--figures", tmp_path / "f", "--json")
    assert len(json.loads(quiet.out)) == 4


def test_masks_are_drawn_on_an_image_as_the_model_saw_it(
    cli, certificates: Path, photos: Path, tmp_path: Path, drawn: list[tuple[Any, ...]]
):
    done = cli("report", certificates / "16x16-k2", "--figures", tmp_path / "f", "--data", photos)
    assert done.code == 0, done.err
    ((image, _, _, caption),) = drawn
    expected = np.asarray(Image.open(photos / "blue" / "0.png")).transpose(2, 0, 1)
    assert (image == expected).all()
    assert "blank" not in caption


def test_masks_that_the_searches_find(
    cli, certificates: Path, trained: Path, photos: Path, tmp_path: Path, drawn: list[tuple[Any, ...]]
):
    import torch

    from certipatch.training.strategies import STRATEGIES

    done = cli("report", certificates / "5x5-k3", figures=tmp_path / "f", model=trained, data=photos)
    assert done.code == 0, done.err
    assert "masks:" not in done.err
    ((image, _, panels, _),) = drawn
    network = open_run(trained).network
    masks = MaskSet.covering(image_size=SIZE, patch_size=(5, 5), masks_per_axis=3)
    found = {panel.title.split("\n")[0]: panel.hidden for panel in panels}
    assert list(found) == list(STRATEGIES)
    x, y = torch.from_numpy(image)[None] / 255, torch.tensor([0])
    assert network(x).argmax() == 0
    for name in ("greedy-coarse", "grid-fine"):
        (windows,) = STRATEGIES[name](network, x, y, masks, fill=torch.tensor([0.5] * 3))[0].tolist()
        assert [(w.top, w.left, w.top + w.height, w.left + w.width) for w in found[name]] == [
            tuple(window) for window in windows
        ]


def test_without_the_strategies_that_cannot_look_at_the_model(
    cli,
    certificates: Path,
    trained: Path,
    photos: Path,
    tmp_path: Path,
    drawn: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
):
    from certipatch.errors import ConfigError

    def no_map(*_: object) -> None:
        raise ConfigError("Grad-CAM: expected a layer whose output is a map")

    monkeypatch.setattr("certipatch.training.hiding.saliency", no_map)
    done = cli("report", certificates / "5x5-k3", figures=tmp_path / "f", model=trained, data=photos)
    assert done.code == 0, done.err
    assert (
        "masks: without gutout-coarse, gutout-fine, gutout-both, which find no feature map of the model to "
        "look at" in done.err
    )
    titles = {panel.title.split("\n")[0] for panel in drawn[0][2]}
    assert titles == {name for name in STRATEGIES if not name.startswith("gutout")}


def test_figures_that_cannot_be_drawn(cli, certificates: Path, trained: Path, photos: Path, tmp_path: Path):
    folder = certificates / "5x5-k2"
    (tmp_path / "file").write_text("")
    others = write_photos(tmp_path / "others", each=2)
    run = typed(
        "train", model="small-cnn", data=photos, val_data=photos, strategy="vanilla", patch=5, epochs=1
    )
    assert cli(*run, "--out", tmp_path / "run").code == 0
    for options, words in [
        (("--figures", tmp_path / "file"), "expected a folder to write, found a file"),
        (("--figures", ""), "expected a folder to write, found no name"),
        (("--model", trained), "expected --figures with it"),
        (("--figures", tmp_path / "f", "--model", tmp_path / "run"), "is of another model"),
        (("--figures", tmp_path / "f", "--model", folder), "expected a training run"),
        (
            ("--figures", tmp_path / "f", "--data", others),
            "expected the images that were certified, found others",
        ),
    ]:
        done = cli("report", folder, *options)
        assert (done.code, done.out) == (2, ""), options
        assert words in done.err
        assert done.err.count("\n") == 1, done.err
    assert not (tmp_path / "f").exists()

    detected = tmp_path / "detected"
    cli("detect", model=trained, data=photos, patch=5, masks_per_axis=2, limit=3, out=detected)
    assert (
        "expected a folder that certify wrote, found none"
        in cli("report", detected, "--figures", tmp_path / "f").err
    )
