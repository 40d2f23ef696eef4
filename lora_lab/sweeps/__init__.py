"""How many runs get run: multiruns, W&B sweep files, searches, and the launchers of their jobs."""
