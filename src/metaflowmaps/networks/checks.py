"""What several networks ask of their arguments."""

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError


def check_divides(part: int, whole: int, names: tuple[str, str]) -> None:
    """Refuse a part that does not divide the whole."""
    if whole % part:
        raise InputError(f"{names[0]} must divide {names[1]}, got {part} and {whole}; change one of them")


def image_shape(event_shape: tuple[int, ...], name: str) -> tuple[int, int]:
    """Channels and side of square images; any other shape is refused."""
    if len(event_shape) != 3 or event_shape[1] != event_shape[2]:
        raise InputError(
            f"{name} is for square images, and samples have the shape {event_shape}: set model.network=mlp"
        )
    for n in event_shape:
        check_count(n, "event_shape")
    return event_shape[0], event_shape[1]
