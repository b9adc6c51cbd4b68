"""Memory of pipelines against draws: the largest sum of live tensors while one sample is steered, by family.

The networks are tiny, and what a process holds beside tensors is larger than they: so storages are counted, from the
operation that makes one until it is freed, the weights left out. One row is evaluated and decoded at a time.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import metaflowmaps as mfm
from benchmarks.common import keep, say
from benchmarks.tiny_pipelines import FAMILIES

DRAWS, STEPS = (2, 8), 2
METHODS = {
    "values": lambda n: mfm.Glass(num_draws=n, glass_steps=1),
    "gradients": lambda n: mfm.Glass(num_draws=n, glass_steps=1, estimator=mfm.MFMG()),
}


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that were made while it lasts: those alive, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it has made."""
        given = {a.untyped_storage()._cdata for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)}
        out = function(*args, **(kwargs or {}))
        for made in tree_flatten(out)[0]:
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in given | self.known:
                self._count(made.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def main() -> None:
    """Measure, and keep the table."""
    torch.set_num_threads(1)
    figures = {}
    for name in FAMILIES:
        say(f"diffusers-memory: {name}")
        figures[name] = {title: {str(n): peak(name, make(n)) for n in DRAWS} for title, make in METHODS.items()}
    keep("diffusers-memory", "python -m benchmarks diffusers-memory", {"steps": STEPS, "families": figures})


def peak(name: str, method: Any) -> int:
    """Bytes."""
    tiny = FAMILIES[name]
    call, options = next(iter(tiny.calls.items()))
    given = tiny.embeds | (tiny.negative if call != "plain" else {})
    arguments: dict[str, Any] = {key: value[:1] for key, value in given.items()} | options | tiny.size
    pipe = mfm.from_diffusers(tiny.make(), progress=False, micro_batch=1)
    with LiveTensors() as live:
        pipe.steer(
            reward=brightness,
            method=method,
            num_inference_steps=STEPS,
            seed=5,
            output_type="latent",
            **arguments,
        )
    return live.peak


def brightness(pictures: Tensor) -> Tensor:
    """The mean of a picture."""
    return 20 * pictures.flatten(1).mean(1)
