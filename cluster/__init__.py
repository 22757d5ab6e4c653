"""The Ray session, its clusters, and storage."""
