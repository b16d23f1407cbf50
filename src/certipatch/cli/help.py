"""What ``--help`` adds to the options of a command: the groups they are in, and two examples at the end.

An option that no group names stands under "Options"; a test says so.
"""

from __future__ import annotations

GROUPS = {
    "Data": "data split class_map class_names limit val_data val_split",
    "Model": "model weights pretrained image_size crop_pct",
    "Threat": "patch patches masks_per_axis inference thresholds certified records",
    "Defense": "defense windows theta tokens",
    "Proof": "places prove exhaustive",
    "Training": "strategy loss epochs lr optimizer schedule weight_decay momentum augment ema keep "
    "clean_fraction gradcam_layer search_every search_precision",
    "Attack": "steps restarts certified_restarts",
    "Check": "sample every min_margin require",
    "Recipe": "only scale dry_run tflops",
    "Measure": "what repeats full only_certified strategies train_batch_size",
    "Speed": "batch_size device devices nodes precision compile compile_step shared_prefix workers threads "
    "shard engine address devices_per_node submit partition gpus time",
    "Service": "host port max_bytes queue",
    "Hub": "to license private names deployed dry_run_to yes",
    "Output": "out html figures seed resume as_json tensorboard log config like help",
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}

EXAMPLES = {
    "masks": ("--image-size 224 --patch 3%", "--image-size 224 --patch 39x20+20x39 --masks-per-axis 3"),
    "train": (
        "--model resnet18.a1_in1k --pretrained --data photos/train --val-data photos/val "
        "--strategy greedy-multisize --patch 3% --out runs/mine",
        "--config run.toml --out runs/mine",
    ),
    "certify": (
        "--model runs/mine --data photos/val --patch 3% --out runs/mine-certified",
        "--model runs/mine --data photos/val --patch 1%,3% --masks-per-axis 3,6 --limit 100 --out runs/sizes",
    ),
    "detect": (
        "--model runs/mine --data photos/val --patch 3% --out runs/mine-detect",
        "--model runs/mine --data photos/val --patch 1%,3% --thresholds 0,0.9 --out runs/sizes-detect",
    ),
    "predict": (
        "--model runs/mine --certified runs/mine-certified photo.jpg",
        "--model runs/mine --patch 3% --masks-per-axis 3 photo.jpg",
    ),
    "export": (
        "runs/mine --certified runs/mine-certified --data photos/val --out deployed",
        "package.module:function --certified runs/mine-certified --data photos/val --out deployed",
    ),
    "push": (
        "runs/mine runs/mine-certified --to me/mine --dry-run hub",
        "runs/mine runs/mine-certified --to me/mine --license apache-2.0 --no-names",
    ),
    "serve": (
        "--model runs/mine --certified runs/mine-certified",
        "--model runs/mine --certified runs/mine-certified --port 0 --no-prove",
    ),
    "attack": (
        "--model runs/mine --records runs/mine-certified --data photos/val --out runs/mine-attacked",
        "--model runs/mine --records runs/mine-certified --data photos/val --limit 20 --out runs/tried",
    ),
    "verify": ("runs/mine-certified", "runs/mine-certified --model runs/mine --data photos/val --sample 50"),
    "report": (
        "runs/mine-certified --html mine.html",
        "runs/mine-certified --require 'certified>=0.6'",
    ),
    "reproduce": ("table1 --only 'cifar10,resnet*' --dry-run", "lite0 --data imagenette=photos --scale 0.1"),
    "bench": (
        "--model runs/mine --data photos/val --patch 3%",
        "--model runs/mine --data photos/val --certified runs/mine-certified --limit 20",
    ),
    "demo": ("", "--out demo-out --seed 1"),
    "checks": ("", "--json"),
}


def epilog(command: str) -> str:
    """The examples of a command as its ``--help`` ends, each on a line of its own if the terminal has the
    width."""
    lines = [f"  certipatch {command} {words}".rstrip() for words in EXAMPLES[command]]
    return "\n".join(["\b", "Examples:", *lines])
