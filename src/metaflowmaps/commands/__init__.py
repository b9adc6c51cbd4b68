"""What each command does, apart from parsing and printing: a function from arguments to a results dictionary."""

from metaflowmaps.commands.convert import convert
from metaflowmaps.commands.demo import demo
from metaflowmaps.commands.draw import posterior, sample
from metaflowmaps.commands.finetune import Subject, finetune, resolve_finetuning
from metaflowmaps.commands.finetune import default_place as place_of_finetuning
from metaflowmaps.commands.finetune import dry_run as dry_run_finetuning
from metaflowmaps.commands.images import evaluate_images, image_task, trained_on_images
from metaflowmaps.commands.judge import eval_posterior
from metaflowmaps.commands.shared import print_tables
from metaflowmaps.commands.steering import eval_steering, eval_value, steer
from metaflowmaps.commands.train import dry_run, resolve_training, train

__all__ = [
    "Subject",
    "convert",
    "demo",
    "dry_run",
    "dry_run_finetuning",
    "eval_posterior",
    "eval_steering",
    "eval_value",
    "evaluate_images",
    "finetune",
    "image_task",
    "place_of_finetuning",
    "posterior",
    "print_tables",
    "resolve_finetuning",
    "resolve_training",
    "sample",
    "steer",
    "train",
    "trained_on_images",
]
