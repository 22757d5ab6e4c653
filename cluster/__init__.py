"""Where jobs run and where bytes live: the Ray session and storage."""
