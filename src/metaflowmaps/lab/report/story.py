"""A story as markup: panels that the page's script shows one at a time, each with all that it says written down."""

from collections.abc import Mapping

from torch import Tensor

from metaflowmaps.lab.report.page import data_uri, escaped
from metaflowmaps.lab.report.sections import number
from metaflowmaps.lab.story import Posterior, Steered, SteeredBy, Story

OPENED_TIME = 0.3  # the panel shown first: the state says something, and not all
COLUMNS = 8
HEAD = ("method", "reward", "diversity", "evaluations", "seconds")
POINT = "Point at a picture for its {}."


def story_cards(story: Story, pictures: Mapping[str, Tensor]) -> str:
    """The story's cards: what noisy pictures may be, and what rewards make of samples."""
    cards = []
    if story.posterior is not None:
        cards.append(_posterior(story.posterior, pictures["noisy"], pictures["draws"]))
    if story.steered:
        rewards = "".join(_reward(steered, i, pictures) for i, steered in enumerate(story.steered))
        several = len(story.steered) > 1
        panels = f'<div class="panels" data-by="buttons" data-first="0">{rewards}</div>' if several else rewards
        cards.append(f'<article class="card"><h3>Steer it to what you want</h3>{panels}</article>')
    return f'<div class="story">{"".join(cards)}</div>'


def _posterior(posterior: Posterior, noisy: Tensor, draws: Tensor) -> str:
    times = posterior.times
    first = min(range(len(times)), key=lambda i: abs(times[i] - OPENED_TIME))
    panels = "".join(
        _panel(f"t = {t:g}", _strips(t, states, made, posterior))
        for t, states, made in zip(times, noisy, draws, strict=True)
    )
    hint = f'<p class="readout" aria-live="polite">{POINT.format("seed")}</p>' if posterior.seeds else ""
    return (
        f'<article class="card"><h3>What may this noisy picture be?</h3><p>{escaped(posterior.sentence)}</p>'
        f'<div class="panels" data-by="slider" data-first="{first}">{panels}</div>{hint}</article>'
    )


def _strips(t: float, states: Tensor, made: Tensor, posterior: Posterior) -> str:
    """A row a noisy picture: itself, and its draws."""
    titles = [f"draw {i}" + (f", seed {posterior.seeds[i - 1]}" if posterior.seeds else "") for i in _counted(made[0])]
    return "".join(
        f'<div class="strip" style="--columns: {len(row)}">{_image(state, f"noisy picture at t = {t:g}")}'
        + "".join(_image(draw, title) for draw, title in zip(row, titles, strict=True))
        + "</div>"
        for state, row in zip(states, made, strict=True)
    )


def _counted(rows: Tensor) -> range:
    return range(1, len(rows) + 1)


def _reward(steered: Steered, i: int, pictures: Mapping[str, Tensor]) -> str:
    panels = "".join(
        _panel(method.title, _gallery(method, pictures[f"steered.{i}.{j}"])) for j, method in enumerate(steered.methods)
    )
    said = "reward and seed" if any(method.seeds for method in steered.methods) else "reward"
    return _panel(
        steered.wanted,
        f"<p>{escaped(steered.sentence)}</p>"
        f'<div class="panels" data-by="table" data-first="{steered.first}">{panels}</div>'
        f'<p class="readout" aria-live="polite">{POINT.format(said)}</p>{_costs(steered)}',
    )


def _panel(name: str, body: str) -> str:
    """One of several, with its name above it where all are seen."""
    return f'<div class="panel" data-name="{escaped(name)}"><p class="name">{escaped(name)}</p>{body}</div>'


def _gallery(method: SteeredBy, pictures: Tensor) -> str:
    titles = [f"reward {number(reward)}" for reward in method.rewards]
    if method.seeds:
        titles = [f"{title}, seed {seed}" for title, seed in zip(titles, method.seeds, strict=True)]
    cells = "".join(_image(x, title) for x, title in zip(pictures, titles, strict=True))
    return f'<div class="gallery" style="--columns: {COLUMNS}">{cells}</div>'


def _costs(steered: Steered) -> str:
    """The one small table: a row a method."""
    head = "".join(f'<th scope="col"{_kind(i)}>{name}</th>' for i, name in enumerate(HEAD))
    rows = "".join(
        "<tr>" + "".join(f"<td{_kind(i)}>{escaped(cell)}</td>" for i, cell in enumerate(_row(method))) + "</tr>"
        for method in steered.methods
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(method: SteeredBy) -> list[str]:
    worth = (f"{method.reward:.3g}", f"{method.diversity:.3g}")
    return [method.title, *worth, f"{method.evaluations:,.0f}", f"{method.seconds:.2g}"]


def _kind(column: int) -> str:
    return ' class="number"' if column else ""


def _image(x: Tensor, title: str) -> str:
    """A picture (C, H, W) of bytes, as large as its place."""
    height, width = x.shape[1:]
    return (
        f'<img alt="{escaped(title)}" title="{escaped(title)}" width="{width}" height="{height}" src="{data_uri(x)}">'
    )
