"""Play with a map of pictures in a browser: draw what a noisy picture may be, and watch samples being steered.

The page is served from this machine to this machine. Rewards of your own: --reward my.py:reward (repeatable).
"""

from typing import Annotated

from pydantic import Field

from metaflowmaps.cli.context import Argument, Context, Options
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.play.playground import Playground
from metaflowmaps.lab.play.server import PlayServer


class Play(Options):
    """Which map, and where the page is."""

    shared = ("device",)

    checkpoint: Annotated[str, Argument("[CHECKPOINT]")] = Field(
        "digits", description="A run or checkpoint directory, a hub id, or a shipped one: digits (the default), emoji."
    )
    reward: tuple[str, ...] = Field((), description="A reward to offer besides the map's own (repeatable).")
    host: str = Field("127.0.0.1", description="Address to listen at; any but this one lets other machines in.")
    port: int = Field(8642, ge=0, le=65535, description="Port; 0 for any that is free.")
    browser: bool = Field(False, description="Open the page in a browser.")


def run(config: Play, context: Context) -> None:
    """Serve until Ctrl-C."""
    playground = Playground(OpenedModel.open(config.checkpoint, context.device), config.reward)
    with PlayServer(playground, config.host, config.port) as server:
        context.say(f"{config.checkpoint}: open {server.url} in a browser; Ctrl-C ends it")
        if config.browser:
            import webbrowser

            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            context.say("stopping …")
        finally:
            playground.close()
    context.say("stopped")
