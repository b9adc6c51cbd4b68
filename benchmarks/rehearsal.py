"""The whole way from pictures to a steered pipeline, with everything tiny: ``make rehearsal``.

    pictures → mfm encode-latents → a file in SiT's layout → mfm convert → torchrun, two ranks → kill −9 → mfm train on
    one rank → mfm convert → mfm.Pipeline → mfm steer, reward by a CLIP → mfm eval → mfm report

Every command is the one a user with a cluster and the published weights types; only the weights are random and small,
so the pictures mean nothing. What is checked is that each step takes up what the last one left.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file


class Size(NamedTuple):
    """How much of everything."""

    side: int  # of a picture, in pixels
    per_class: int
    width: int
    depth: int
    steps: int
    batch: int
    samples: int


SIZES = {"full": Size(256, 24, 48, 4, 200, 16, 64), "small": Size(64, 6, 32, 2, 24, 8, 16)}
CLASSES = 4
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Rehearsal:
    """One directory, one log; a step that fails ends it with what the command said."""

    def __init__(self, out: Path, size: Size, say: Callable[[str], None] = print) -> None:
        self.out, self.size, self.say = out, size, say
        self.lines: list[str] = []
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> list[str]:
        """All steps; the log, a line each."""
        self.props()
        self.mfm("encode-latents", "pictures", "--vae", "vae", "--size", self.size.side, "--flip", "--out", "latents")
        self.mfm("convert", "sit.safetensors", "--set", "heads=4", "--set", "encoder_depth=1", "--vae", "vae",
                 "--set", "guidance=[1.0, 2.5]", "--out", "parent")  # fmt: skip
        self.killed_on_two_ranks()
        self.mfm(*self.training())
        self.mfm("convert", "run", "--out", "map")
        self.pipeline()
        self.mfm("steer", "map", "--reward", "clip@clip:a red disc", "--strength", "20", "--label", "1", "--guidance",
                 "2.5", "--num", self.size.samples // 4, "--num-draws", "1", "--steps", "10", "--images",
                 "--out", "steered")  # fmt: skip
        self.mfm("eval", "generation", "map", "--set", f"samples={self.size.samples}", "--set", "data=latents",
                 "--set", "refine_steps=[1,2,4]", "--set", "compose_steps=[]", "--set", "ode_steps=[4]",
                 "--out", "evaluated")  # fmt: skip
        self.mfm("report", "run", "steered", "evaluated", "--out", "report.html")
        (self.out / "rehearsal.log").write_text("\n".join(self.lines) + "\n")
        return self.lines

    # -- steps -------------------------------------------------------------------------------------------------------

    def props(self) -> None:
        """Pictures, an autoencoder, a CLIP and a file in SiT's layout, all small and random."""
        began = time.perf_counter()
        from tests.tiny_codec import tiny_vae

        from benchmarks.synthetic_pictures import write_synthetic

        if not (self.out / "sit.safetensors").exists():
            write_synthetic(self.out / "pictures", CLASSES, self.size.per_class, self.size.side)
            tiny_vae().save_pretrained(self.out / "vae")
            save_clip(self.out / "clip")
            save_sit(self.out / "sit.safetensors", self.size)
        self.note("props: pictures, autoencoder, CLIP, a file in SiT's layout", began)

    def training(self) -> list[str]:
        """The command that trains, whatever the number of ranks."""
        s = self.size
        settings = {
            "parent": "parent", "steps": s.steps, "batch_size": s.batch, "drift_batch_size": s.batch,
            "checkpoint_every": max(s.steps // 8, 1), "log_every": max(s.steps // 8, 1), "sample_every": 0,
            "threads": 1, "optimizer.warmup_steps": 5,
        }  # fmt: skip
        given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        return ["train", "latents", "--data", "latents", *given, "--device", "cpu", "--out", "run"]

    def killed_on_two_ranks(self) -> None:
        """Two ranks until the second checkpoint is there, then a kill that nobody hears coming."""
        began = time.perf_counter()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
                   "metaflowmaps.cli", *self.training()]  # fmt: skip
        with (self.out / "ranks.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=self.out, env=_environment(), stdout=log, stderr=log, start_new_session=True
            )
            while process.poll() is None and len(self.checkpoints()) < 2 and time.perf_counter() - began < 600:
                time.sleep(0.02)
            ended = process.poll()
            _kill(process)
        if ended is not None:
            raise SystemExit(
                f"two ranks ended by themselves ({ended}):\n{(self.out / 'ranks.log').read_text()[-3000:]}"
            )
        self.note(f"{shlex.join(['torchrun', *command[3:]])}; killed after {self.checkpoints()[-1]}", began)

    def checkpoints(self) -> list[str]:
        return sorted(
            path.name for path in self.out.glob("run/checkpoints/step-*/manifest.json") for path in [path.parent]
        )

    def pipeline(self) -> None:
        """Pictures, draws and an estimate, from Python."""
        import metaflowmaps as mfm

        began = time.perf_counter()
        before = Path.cwd()
        os.chdir(self.out)
        try:
            pipe = mfm.Pipeline.from_pretrained("map")
            g = torch.Generator().manual_seed(0)
            made = pipe(1, steps=4, guidance=2.5, num_images=2, seed=g)
            drawn = pipe.posterior(made.images[0], 0.5, num_draws=2, label=1, guidance=2.5, generator=g)
            cost = pipe.estimate(4, label=1, steps=4)
        finally:
            os.chdir(before)
        made.images[0].save(self.out / "picture.png")
        drawn.images[1][0].save(self.out / "drawn.png")
        assert made.images[0].size == (self.size.side, self.size.side)
        self.note(f"mfm.Pipeline: two pictures, two draws; four more would take {cost['forwards']:.0f} calls", began)

    # -- how ---------------------------------------------------------------------------------------------------------

    def mfm(self, *arguments: object) -> None:
        """One command of the command line."""
        words: Sequence[str] = ["mfm", *map(str, arguments)]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "metaflowmaps.cli", *words[1:]],
            cwd=self.out, env=_environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{shlex.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        self.note(shlex.join(words), began)

    def note(self, what: str, began: float) -> None:
        self.lines.append(f"{time.perf_counter() - began:6.1f} s  {what}")
        self.say(self.lines[-1])


def save_sit(path: Path, size: Size) -> None:
    """Random weights under SiT's keys, for latents of this size."""
    from metaflowmaps.interop.pretrained.layout import Shape, expected
    from metaflowmaps.interop.pretrained.sit import SIT
    from metaflowmaps.networks.embed import positions

    g, side = torch.Generator().manual_seed(0), size.side // 8
    shape = Shape(size.width, size.depth, 2, 4, side, CLASSES, 4 * size.width, 256, 0)
    weights = {key: torch.randn(s, generator=g) / 8 for key, s in expected(SIT, shape).items()}
    weights["pos_embed"] = positions(size.width, side // 2)[None]
    save_file(weights, path)


def save_clip(folder: Path) -> None:
    """A random CLIP of two layers with a tokenizer of letters, in the layout of transformers."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vocabulary = {piece: i for i, piece in enumerate([*LETTERS, *(f"{c}</w>" for c in LETTERS)])}
    vocabulary |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    layer = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 54, "max_position_embeddings": 24, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPConfig(
        text_config={**layer, **text, "projection_dim": 8},
        vision_config={**layer, "image_size": 32, "patch_size": 8, "projection_dim": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The launcher and its ranks, each of which may lead a session of its own."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False).stdout
    for pid in [process.pid, *map(int, children.split())]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument("--size", choices=SIZES, default="full")
    given = parser.parse_args()
    Rehearsal(given.out.resolve(), SIZES[given.size]).run()


if __name__ == "__main__":
    main()
