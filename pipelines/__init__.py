"""The jobs a user runs, one file per job."""
