"""Names people read, beside the folder's name that records keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from certipatch.data.words import in_words, read_class_names
from certipatch.errors import ConfigError
from inputs import typed, write_photos


def test_wordnet():
    assert in_words(["n03000684", "n01440764", "cat", "n99999999", "n3"]) == [
        "chain saw (n03000684)",
        "tench (n01440764)",
        "cat",
        "n99999999",
        "n3",
    ]


def test_a_file_comes_first(tmp_path: Path):
    path = tmp_path / "names.txt"
    text = "n03000684 Kettensäge, Motorsäge\nred\tthe colour red\nhot dog\tsausage\n\n"
    path.write_text(text, encoding="utf-8")
    given = read_class_names(path)
    assert in_words(["n03000684", "red", "hot dog", "blue"], given) == [
        "Kettensäge, Motorsäge (n03000684)",
        "the colour red (red)",
        "sausage (hot dog)",
        "blue",
    ]


@pytest.mark.parametrize("text", ["red", "red\tx\nred\ty", "red\t", b"red\t\xff"])
def test_what_is_refused(tmp_path: Path, text: str | bytes):
    path = tmp_path / "names.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"names\.txt"):
        read_class_names(path)
    with pytest.raises(ConfigError, match="none"):
        read_class_names(tmp_path / "none")


def test_page_and_predict_show_them_and_records_do_not(cli, tmp_path: Path):
    data = write_photos(tmp_path / "data", classes=("n03000684", "red"), each=4)
    (tmp_path / "names.txt").write_text("red\ta rose\n", encoding="utf-8")
    run, out, page = tmp_path / "run", tmp_path / "c", tmp_path / "page.html"
    given = typed("train", model="small-cnn", data=data, val_data=data, strategy="vanilla", patch=5, epochs=1)
    assert cli(*given, out=run).code == 0
    assert cli("certify", model=run, data=data, patch=5, masks_per_axis=2, out=out).code == 0
    done = cli("report", out, html=page, class_names=tmp_path / "names.txt")
    assert done.code == 0, done.err
    shown = page.read_text(encoding="utf-8")
    assert "chain saw (n03000684)" in shown
    assert "a rose (red)" in shown
    assert "chain saw" not in (out / "manifest.json").read_text(encoding="utf-8")
    assert "chain saw" not in (out / "records.jsonl").read_text(encoding="utf-8")
    image = data / "red" / "0.png"
    named = typed(model=run, certified=out, class_names=tmp_path / "names.txt")
    answer = json.loads(cli("predict", image, *named).out)
    words = {"red": "a rose (red)", "n03000684": "chain saw (n03000684)"}
    assert answer["class_in_words"] == words[answer["class"]]
