"""What can be set, and is it right? The schema of a config, its checks and its composition."""
