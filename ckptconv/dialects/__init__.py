"""Raw trees <-> checkpoints, one file each."""
