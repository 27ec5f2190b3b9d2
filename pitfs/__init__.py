"""pitfs: replicates block volumes and mounts the replica at any instant."""

__version__ = "0.1.0"
