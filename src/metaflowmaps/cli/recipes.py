"""List the recipes: those to train, then those to run on a map."""

from metaflowmaps.cli.context import Context, Options, Results


class ListRecipes(Options):
    """No options."""

    shared = ()

    def next_command(self, results: Results, folder: str) -> str:
        """A minute on two cores."""
        return "mfm train gmm --fast"


def run(config: ListRecipes, context: Context) -> str:
    """A line a recipe."""
    from metaflowmaps.lab.imagenet_tasks import TASKS
    from metaflowmaps.recipes import RECIPES

    every = {**RECIPES, **TASKS}.items()
    return "\n".join(f"{name:21s} {(make.__doc__ or '').strip().splitlines()[0]}" for name, make in every)
