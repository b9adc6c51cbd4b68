"""How much a data set may take: it is kept in memory whole."""

from pathlib import Path

from metaflowmaps.errors import InputError

MAX_BYTES = 4 * 2**30
MAX_SIDE = 64  # of the square, where no size is asked for


def check_memory(path: Path, shape: tuple[int, ...], item_bytes: int, train: int, held_out: int) -> None:
    """Refuse what exceeds the bound, with the settings that fit."""
    each = item_bytes * shape[0] * shape[1] * shape[2]
    if (train + held_out) * each <= MAX_BYTES:
        return
    fits = MAX_BYTES // each
    if fits > held_out:
        settings = f"--set data.limit={fits - held_out}"
    elif fits > 1:
        settings = f"--set data.limit={fits - fits // 10 - 1} --set data.hold_out={fits // 10 + 1}"
    else:
        settings = f"--set data.size={MAX_SIDE}"
    raise InputError(
        f"{path}: {train + held_out:,} images of {'×'.join(map(str, shape))} take "
        f"{(train + held_out) * each / 2**30:.3g} GiB of memory, the bound is {MAX_BYTES / 2**30:.3g}: {settings}"
    )
