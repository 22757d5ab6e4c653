"""`python -m pipelines.small_model`: train the bundled model from nothing."""

import typer

from pipelines.small_model.recipe import main

if __name__ == "__main__":  # spawned processes import this file again
    typer.run(main)
