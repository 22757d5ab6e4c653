"""`python -m pipelines.cli`: the `glad` command where there may be no console script, as in a job on a cluster."""

from cluster.versions import check_sent_job

check_sent_job()  # before the imports, which may fail there

from pipelines.cli.main import main  # noqa: E402

main()
