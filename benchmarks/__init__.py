"""Benchmarks: ``python -m benchmarks [NAME …]``, and the tables of the docs that are made of their results."""

BENCHMARKS = {
    "step-cost": "step_cost:main",
    "step-cost-transformer": "step_cost:transformer",
    "precision": "precision:main",
    "fidelity": "fidelity:main",
    "glass": "fidelity:glass",
    "losses": "losses:main",
    "steering": "steering:gmm_inverse",
    "steering-seeds": "steering:gmm_inverse_seeds",
    "steering-16d": "steering:in_16d",
    "rivals": "rivals:main",
    "defaults": "defaults:main",
    "frontier": "frontier:main",
    "low-dimensional": "low_dimensional:main",
    "error-propagation": "error_propagation:main",
    "value": "steering:value",
    "recycling": "steering:recycling",
    "finetune-mixture": "finetuning:mixture",
    "finetune-digits": "finetuning:digits",
    "images": "images:main",
    "digits-one-setting": "one_setting:main",
    "memory": "memory:main",
    "memory-pipeline": "memory:pipeline",
    "world-size": "world_size:main",
    "control": "control:main",
}
"""Name of a benchmark -> module of this package and function."""
