"""What a user of other tools expects of a command line: files of options, the environment, help in groups,
exit codes, errors of one line, and tables in a narrow terminal."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import typer
from rich.table import Table

from certipatch.certification.certify import certify
from certipatch.cli.app import app
from certipatch.cli.command import NOT_IN_A_FILE, Command, typed_name
from certipatch.cli.help import EXAMPLES, GROUP_OF
from certipatch.cli.parse import model_name
from certipatch.data.load import load_source
from certipatch.errors import BrokenCertificateError, MachineError, SoundnessError, exit_code
from certipatch.geometry.masks import MaskSet
from certipatch.models.runs import open_run
from certipatch.records.manifest import read_manifest
from certipatch.runtime.console import print_table, stdout
from certipatch.runtime.devices import make_fabric
from inputs import refused, typed, write_manifest

GROUP = typer.main.get_command(app)
COMMANDS: dict[str, Command] = GROUP.commands  # type: ignore[attr-defined]
FILE = """
device = "cpu"
model = "small-cnn"
[train]
data = "digits"
strategy = "vanilla"
patch = 3
epochs = 1
limit = 64
compile = false
[masks]
image-size = 32
json = true
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


class TestConfig:
    def test_command_line_then_environment_then_file(
        self, cli, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("CERTIPATCH_TRAIN_LR", "0.02")
        monkeypatch.setenv("CERTIPATCH_TRAIN_LIMIT", "48")
        done = cli("train", config=config, epochs=2, out=tmp_path / "run")
        assert done.code == 0, done.err
        manifest = read_manifest(tmp_path / "run")
        stated = manifest.stated["train"]
        assert (stated["patch_size"], stated["epochs"], stated["lr"]) == ([3, 3], 2, 0.02)
        assert manifest.stated["data"]["images"] == 48
        for words in ("--lr 0.02", "--limit 48", "--patch 3", "--device cpu", "--no-compile", "--epochs 2"):
            assert words in manifest.command
        assert "--config" not in manifest.command

    def test_a_flag_and_what_another_command_takes(self, cli, config: Path):
        done = cli("masks", config=config, patch=5)
        assert done.code == 0, done.err
        assert json.loads(done.out)["patch_size"] == [5, 5]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("epoks = 3", ["'epoks'", "epochs"]),
            ("[train]\nepoks = 3", ["'epoks'", "epochs"]),
            ("[train]\nhtml = 'x'", ["'html'"]),
            ("[tain]\nepochs = 3", ["'tain'", "train"]),
            ("compile = 'no'", ["true or false", "'no'"]),
            ("epochs = true", ["text or a number", "True"]),
            ("epochs = [1, 2]", ["epochs", "[1, 2]"]),
            ("epochs = 2026-11-27", ["epochs"]),
            ("config = 'other.toml'", ["'config'"]),
            ("epochs = ", ["TOML"]),
        ],
    )
    def test_what_is_refused(self, cli, tmp_path: Path, text: str, words: list[str]):
        (tmp_path / "bad.toml").write_text(text)
        refused(cli("train", config=tmp_path / "bad.toml"), "bad.toml", *words)

    def test_no_file(self, cli, tmp_path: Path):
        refused(cli("masks", config=tmp_path / "none.toml"), "none.toml")

    def test_a_misspelt_variable(self, cli, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("CERTIPATCH_MASKS_PATH", "3%")
        refused(cli("masks", image_size=32, patch=3), "CERTIPATCH_MASKS_PATCH", "CERTIPATCH_MASKS_PATH")


class TestLike:
    def test_trains_the_same_again(self, cli, config: Path, tmp_path: Path):
        first = tmp_path / "the first"
        assert cli("train", config=config, seed=3, batch_size=16, out=first).code == 0
        written = cli("train", like=first)
        assert written.code == 0, written.err
        (tmp_path / "again.toml").write_text(written.out, encoding="utf-8")
        done = cli("train", config=tmp_path / "again.toml", out=tmp_path / "again")
        assert done.code == 0, done.err
        weights = [(folder / "model.safetensors").read_bytes() for folder in (first, tmp_path / "again")]
        assert weights[0] == weights[1]

    def test_of_a_run_that_no_command_made(self, cli, trained: Path):
        done = cli("train", like=trained)
        assert done.code == 0, done.err
        assert 'strategy = "greedy-coarse"' in done.out
        assert 'patch = "5x5"' in done.out

    def test_of_something_else(self, cli, tmp_path: Path):
        refused(cli("train", like=Path(__file__).parents[1] / "records" / "format-1" / "certified"), "train")
        refused(cli("train", like=tmp_path), "manifest.json")


class TestHelp:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_each_option_has_a_group(self, name: str):
        for param in COMMANDS[name].params:
            if param.param_type_name == "option":
                assert param.name in GROUP_OF, f"{name} --{param.name}: cli/help.py names no group"

    @pytest.mark.parametrize("name", COMMANDS)
    def test_ends_with_two_examples_that_parse(self, name: str, cli, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run.toml").write_text(FILE)
        shown = cli(name, "--help").out
        examples = [line.strip() for line in shown[shown.index("Examples:") :].splitlines()[1:] if line]
        assert len(examples) == len(EXAMPLES[name]) == 2
        for example in examples:
            program, command, *words = shlex.split(example)
            assert (program, command) == ("certipatch", name)
            parent = GROUP.make_context("certipatch", [command])
            COMMANDS[name].make_context(name, words, parent=parent)

    def test_groups(self, cli):
        shown = cli("certify", "--help").out
        found = re.findall(r"^(\w+):", shown, flags=re.MULTILINE)
        assert found == ["Usage", "Data", "Model", "Threat", "Defense", "Proof", "Speed", "Output"]


class TestExitCodes:
    """0 fine, 1 checked and failed, 2 usage or input, 3 the machine, 130 interrupted."""

    def test_of_errors(self):
        assert exit_code(BrokenCertificateError("x")) == 1
        assert exit_code(SoundnessError("x")) == 2
        assert exit_code(FileNotFoundError(2, "x")) == 2
        assert exit_code(MachineError("x")) == 3
        assert exit_code(OSError(28, "no space left on device")) == 3
        assert exit_code(MemoryError()) == 3
        assert exit_code(RuntimeError("ours")) is None
        assert exit_code(RuntimeError("operator torchvision::nms does not exist")) == 3
        assert exit_code(ImportError("libcudart.so: cannot open", name="torch._C")) == 3
        assert exit_code(ImportError("ours", name="certipatch.x")) is None

    def test_verify_finds_something(self, cli, trained: Path, photos: Path, tmp_path: Path):
        given = typed(model=trained, data=photos, patch=5, masks_per_axis=2, limit=6)
        assert cli("certify", *given, out=tmp_path / "c").code == 0
        assert cli("verify", tmp_path / "c", model=trained, data=photos).code == 0
        path = tmp_path / "c" / "manifest.json"
        changed = json.loads(path.read_text(encoding="utf-8"))
        changed["experiment"]["masks"]["windows"][0] = [[0, 0, 1, 1]]
        write_manifest(path, changed)
        assert cli("verify", tmp_path / "c").code == 1

    def test_a_broken_certificate(self, cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch):
        from certipatch.redteam import attack

        given = typed(model=trained, data=photos, patch=5, masks_per_axis=2, limit=6)
        assert cli("certify", *given, out=tmp_path / "c").code == 0

        def broken(*_: object, **__: object) -> None:
            raise BrokenCertificateError("image 3: a certificate is broken")

        monkeypatch.setattr(attack, "attack", broken)
        done = cli("attack", model=trained, records=tmp_path / "c", data=photos, out=tmp_path / "a")
        assert (done.code, done.err.count("\n")) == (1, 1)

    def test_a_device_that_is_not_here(self, cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch):
        if torch.backends.mps.is_available():
            pytest.skip("this machine has the device")
        given = typed(model=trained, data=photos, patch=5, out=tmp_path / "c")
        done = cli("certify", *given, device="mps")
        assert (done.code, "mps" in done.err) == (3, True), done.err

    def test_interrupted(self, cli, monkeypatch):
        def stopped(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("certipatch.cli.masks._facts", stopped)
        assert cli("masks", image_size=32, patch=3).code == 130


@pytest.fixture(scope="module")
def certified(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("required") / "c"
    opened = open_run(trained)
    fine = MaskSet.covering(image_size=(32, 32), patch_size=(20, 20), masks_per_axis=3)
    certify(opened, load_source(str(photos)), fine, out, fabric=make_fabric(device="cpu"))
    return out


class TestRequire:
    def test_is_exact(self, cli, certified: Path):
        (found,) = json.loads(cli("report", certified, json=True).out)
        share = found["certified_robust_accuracy"]
        exact = Fraction(share["count"], share["images"])
        assert 0 < exact < 1
        below, above = int(exact * 10**6) / 10**6, (int(exact * 10**6) + 1) / 10**6
        assert cli("report", certified, require=f"certified>={below:.6f}").code == 0
        done = cli("report", certified, require=f"certified_robust_accuracy >= {above:.6f}")
        assert (done.code, "not met" in done.err, "certified" in done.out) == (1, True, True)
        assert cli("report", certified, "--require", "clean>0", "--require", "certified<0.01").code == 1
        assert cli("report", certified, require="certified>=1%").code == 0

    def test_of_a_folder_that_is_not_complete(self, cli, certified: Path, tmp_path: Path):
        shutil.copytree(certified, tmp_path / "part")
        lines = (certified / "records.jsonl").read_bytes().splitlines(keepends=True)
        path = tmp_path / "part" / "manifest.json"
        begun = json.loads(path.read_text(encoding="utf-8"))
        write_manifest(path, {**begun, "finished": None})
        (tmp_path / "part" / "records.jsonl").write_bytes(b"".join(lines[:5]))
        for beside in tmp_path.glob("part/*.sha256"):
            beside.write_bytes(b"".join(beside.read_bytes().splitlines(keepends=True)[:5]))
        done = cli("report", tmp_path / "part", require="certified>=0")
        assert (done.code, "not complete" in done.err) == (1, True), done.err

    @pytest.mark.parametrize("text", ["certified", "robust>=0.5", "certified>=2", "certified=>0.5", ""])
    def test_what_is_refused(self, cli, certified: Path, text: str):
        refused(cli("report", certified, "--require", text), "require")

    def test_of_what_the_folder_has_not(self, cli, certified: Path):
        refused(cli("report", certified, "--require", "attacked>=0.5"), "attacked_accuracy")


class TestUsage:
    """One line, as for all other errors."""

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["train", "--epoch", "3"], "--epochs"),
            (["train"], "--model"),
            (["trian"], "trian"),
            (["certify", "--limit", "many"], "--limit"),
            (["masks", "--patch"], "--patch"),
            (["masks", "--patches", "3", "--patch", "1", "--image-size", "9"], "--patches"),
            (["predict"], "images"),
        ],
    )
    def test_one_line(self, cli, words: list[str], said: str):
        done = cli(*words)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), done.err
        assert done.err.startswith("certipatch")
        assert said in done.err
        assert "--help" in done.err

    def test_no_word(self, cli):
        done = cli()
        assert (done.code, done.err) == (2, "")
        assert "Commands:" in done.out


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("hf_hub:timm/resnet18.a1_in1k@main", "resnet18.a1_in1k"),
        ("hf-hub:resnet18", "resnet18"),
        ("https://huggingface.co/timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("resnet18", "resnet18"),
        ("runs/timm/x", "runs/timm/x"),
        ("hf-hub:somebody/resnet18", "hf-hub:somebody/resnet18"),
        ("hf-hub:timm/resnet18@v2", "hf-hub:timm/resnet18@v2"),
        (None, None),
    ],
)
def test_names_of_models(text: str | None, name: str | None):
    assert model_name(text) == name


def test_a_folder_called_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm" / "resnet18").mkdir(parents=True)
    assert model_name("timm/resnet18") == "timm/resnet18"


def test_checks(cli):
    found = json.loads(cli("checks", json=True).out)
    for name in ("certipatch", "python", "torch", "timm", "cpu", "cuda", "mps", "bf16", "compiler", "here"):
        assert found[name]
    assert str(Path.home()) not in json.dumps(found)
    assert "GB free" in found["here"]


@pytest.mark.parametrize("width", [30, 50, 66, 80, 200])
def test_no_terminal_is_too_narrow_for_a_digit(width: int, monkeypatch, capsys):
    """Every cell is there in full, in a table or below each other."""
    table = Table(caption="of these images")
    table.add_column("run", overflow="fold", min_width=10)
    cells = ["91.25-93.75", "1234567", "100.0 %", "0.0-56.1", "45/50"]
    for i, _ in enumerate(cells):
        table.add_column(f"share\n{i}", justify="right")
    table.add_row("runs/mine/" * 5, *cells)
    monkeypatch.setattr(stdout, "_width", width)
    print_table(table)
    shown = capsys.readouterr().out
    for cell in cells:
        assert cell in shown
    assert "…" not in shown
    assert ("share 4: 45/50" in shown) == (width < 66)


def test_a_file_takes_every_option():
    for command in COMMANDS.values():
        names = [typed_name(param) for param in command.params if param.name not in NOT_IN_A_FILE]
        assert len(names) == len(set(names))
