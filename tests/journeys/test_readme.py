"""What the README and the docs tell a newcomer to type works.

Every page is executed, from its first command to its last.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import typer
from PIL import Image

from certipatch.certification.certify import certify
from certipatch.cli.app import app
from certipatch.data.load import load_source
from certipatch.geometry.masks import MaskSet
from certipatch.models.runs import open_run
from certipatch.runtime.devices import make_fabric
from documentation import PAGES, ROOT, Block, as_run, blocks, executed
from inputs import write_photos

BLOCKS = blocks()
COMMANDS = [(block, command) for block in BLOCKS for command in block.commands]

SLOW = {"benchmarks.md", "cluster.md", "own-images.md", "timm-model.md"}  # the rest takes a few seconds

# What stands in the text, and what is run in its place: a small network, small images, few of them, one
# process.
TINY = [
    (r"^srun ", ""),
    (r"\$SLURM_ARRAY_TASK_ID/64", "1/1"),
    (r"--model mymodels:\w+", "--model runs/mine"),
    (r"--model vit_\S+ --pretrained", "--model test_vit --image-size 32"),
    (r"--model (?!runs/|small-|ibp-small)(?!test_vit)\S+", "--model test_resnet --image-size 32"),
    (r" --pretrained", " --weights tiny.safetensors"),
    (r"blocks\.8\.norm1", "blocks.1.norm1"),
    (r"--devices \d+", "--devices 1"),
    (r"--nodes \d+", "--nodes 1"),
    (r"--device cuda", "--device cpu"),
    (r"/data/imagenet/val", "photos/val"),
    (r"(certify .*)--patch 39x20\+20x39", r"\1--patch 8x4+4x8"),
    (r"--patch 20 --patches 2", "--patch 4 --patches 2"),
    (r"^certipatch train .*", r"\g<0> --epochs 1 --batch-size 8 --limit 16"),
    (r"^certipatch (certify|detect) .*", r"\g<0> --limit 4"),
    (r"^certipatch attack .*", r"\g<0> --limit 2 --steps 1 --restarts 1 --certified-restarts 1"),
    (r"^certipatch verify .*", r"\g<0> --sample 1"),
    (r"^certipatch bench .*", r"\g<0> --limit 2 --repeats 1 --no-compile"),
]
TINY_PYTHON = [
    (r"convnext_tiny.fb_in22k_ft_in1k", "test_resnet"),
    ("pretrained=True", "pretrained=False, num_classes=3"),
]


def tiny(text: str, rules: list[tuple[str, str]]) -> str:
    for there, here in rules:
        text = re.sub(there, here, text)
    return text


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """What a reader has who did what the pages before tell: photographs, a model trained on them, and its
    certification."""
    world = tmp_path_factory.mktemp("world")
    for part in ("all", "train", "val"):
        write_photos(world / "photos" / part, each=8 if part == "train" else 2)
    for name in ("photo1.jpg", "photo2.jpg"):
        Image.open(world / "photos/val/red/0.png").save(world / name)
    (world / "classes.txt").write_text("blue\ngreen\nred\n")
    weights = timm.create_model("test_resnet", num_classes=3).state_dict()
    safetensors.torch.save_file(weights, world / "tiny.safetensors")
    for run in ("mine", "vit"):
        shutil.copytree(trained, world / "runs" / run)
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(6, 6), masks_per_axis=6)
    source, fabric = load_source(str(world / "photos/val")), make_fabric(device="cpu")
    certify(open_run(trained), source, masks, world / "runs/mine-k6", fabric=fabric, data="photos/val")
    return world


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW else [], id=page.name)
        for page in PAGES
    ],
)
def test_every_command_and_python_block_of_a_page(
    page: Path, cli: Callable, world: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
):
    of_page = [block for block in BLOCKS if block.page == page]
    if not any(block.kind == "python" or "tiny" in map(executed, block.commands) for block in of_page):
        pytest.skip("has nothing that is run on small data")
    if any("import foolbox" in block.text for block in of_page):
        pytest.importorskip("foolbox", reason="not installed: pip install '.[photos]'")
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)
    scope: dict[str, object] = {}
    for block, following in zip(of_page, [*of_page[1:], None], strict=True):
        if block.kind == "python":
            exec(compile(tiny(block.text, TINY_PYTHON), str(block), "exec"), scope)
        for command in block.commands:
            if executed(command) == "tiny":
                shown = run(command, cli)
                if following and following.kind == "text" and command.startswith("certipatch masks"):
                    assert shown == following.text, f"{following}: is not what {command!r} prints"


def run(command: str, cli: Callable) -> str:
    """Run a command on small data, in the place of what it, or a page before it, has made already."""
    _, *arguments = shlex.split(tiny(command, TINY))
    if "--out" in arguments and "--resume" not in arguments:
        shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
    done = cli(*arguments)
    assert done.code == 0, f"{command}: {done.err}"
    return done.out


@pytest.mark.slow
def test_the_quick_start_as_it_stands(cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in BLOCKS if block.page.name == "README.md" and "--data digits" in block.text)
    for command in block.commands:
        done = cli(*shlex.split(command)[1:])
        assert done.code == 0, (command, done.err)
    assert "small-cnn" in done.out


def test_nothing_is_left_out():
    """Each block is text, or is executed here, by make docs-commands, or by make itself."""
    fences = sum(len(re.findall(r"^\s*```", page.read_text(), flags=re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS), "a fence that is indented, or does not end"
    assert {block.kind for block in BLOCKS} == {"sh", "python", "text", "bibtex", "yaml", "{eval-rst}"}
    for block, command in COMMANDS:
        assert executed(command), f"{block}: nobody executes {command!r}"
    assert not [block for block in BLOCKS if block.kind == "sh" and not block.commands]
    kinds = [executed(command) for _, command in COMMANDS]
    assert min(kinds.count(kind) for kind in ("tiny", "real", "make")) > 2


def test_make_has_the_targets_that_are_named():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        found
        for page in PAGES
        for found in re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), flags=re.MULTILINE)
    }
    assert {"demo", "test", "fuzz"} <= named <= targets


@pytest.mark.parametrize(("block", "command"), COMMANDS, ids=str)
def test_every_command_has_the_options_it_is_shown_with(block: Block, command: str):
    for text in (command, as_run(command), tiny(command, TINY)):
        for line in re.findall(r"^\s*(?:srun )?certipatch (.*)", text, flags=re.MULTILINE):
            name, *arguments = shlex.split(line.replace("$precision", "32-true"))
            typer.main.get_command(app).commands[name].make_context(name, arguments)


def test_every_option_that_the_text_names_is_one():
    commands = typer.main.get_command(app).commands
    options = {
        name: {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        for name, command in commands.items()
    }
    known = set().union(*options.values(), {"--help", "--version", "--install-completion"})
    seen = 0
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(rf"`(?:certipatch )?((?:{'|'.join(commands)})\b[^`]*|--[^`]+)`", text):
            words = code.split()
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                assert option in options.get(words[0], known), f"{page.name}: {code}"
                seen += 1
    assert seen > 60
