"""``python -m benchmarks [NAME …]``: all benchmarks, or those named."""

import sys

from benchmarks import (
    control,
    fidelity,
    finetuning,
    images,
    losses,
    memory,
    precision,
    rivals,
    steering,
    step_cost,
    world_size,
)

BENCHMARKS = {
    "step-cost": step_cost.main,
    "step-cost-transformer": step_cost.transformer,
    "precision": precision.main,
    "fidelity": fidelity.main,
    "glass": fidelity.glass,
    "losses": losses.main,
    "steering": steering.gmm_inverse,
    "steering-seeds": steering.gmm_inverse_seeds,
    "steering-16d": steering.in_16d,
    "rivals": rivals.main,
    "value": steering.value,
    "recycling": steering.recycling,
    "finetune-mixture": finetuning.mixture,
    "finetune-digits": finetuning.digits,
    "images": images.main,
    "memory": memory.main,
    "memory-pipeline": memory.pipeline,
    "world-size": world_size.main,
    "control": control.main,
}


def main() -> int:
    """Run them in order."""
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}: allowed are {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    for name in names:
        BENCHMARKS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
