"""What the page may ask for, bounded: it is read from a connection, whoever opened that."""

from typing import Annotated

from pydantic import Field

from metaflowmaps.work.config import Config

MAX_SEED = 2**53 - 1  # the largest number that a page can count to
MOST_SAMPLES = 64
MOST_DRAWS = 32
MOST_STEPS = 250
KNOBS = {"num_draws": 64, "n": 1000, "particles": 256}  # options of methods that a page can turn, and their bounds

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class Told(Config):
    """What samples are told, of a map that knows classes."""

    label: str = Field("", max_length=200)
    guidance: float | None = Field(None, ge=0, le=100)


class AskedPictures(Told):
    """Pictures to choose from."""

    seed: Seed = 0


class AskedPosterior(Told):
    """Draws for a picture, noised.

    Args:
        picture: the seed of one that the map made; None: ``pixels``.
        pixels: bytes of one that was drawn, by rows, channels last.
        t: the time that it is noised to.
        noise: the seed of the noise.
        draws: how many.
    """

    picture: Annotated[str, Field(pattern=r"^\d{1,19}$")] | None = None
    pixels: tuple[Annotated[int, Field(ge=0, le=255)], ...] = ()
    t: float = Field(0.4, ge=0, le=1)
    noise: Seed = 0
    draws: int = Field(16, ge=1, le=MOST_DRAWS)


class AskedSteering(Told):
    """Samples, steered.

    Args:
        reward: the number of one that is offered.
        words: what stands after its colon.
        strength: λ.
        method: its name.
        options: those of :data:`KNOBS` that it has.
        steps: of the process.
        num: samples.
        seed: of them all.
    """

    reward: int = Field(ge=0)
    words: str = Field("", max_length=200)
    strength: float = Field(1.0, ge=0, le=1e6)
    method: str = Field(max_length=40)
    options: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    steps: int = Field(50, ge=1, le=MOST_STEPS)
    num: int = Field(16, ge=1, le=MOST_SAMPLES)
    seed: Seed = 0
