"""`python -m pipelines.cli`: the `glad` command where there may be no console script, as in a job on a cluster."""

from pipelines.cli.main import main

main()
