"""What can be set, and whether it is right: the schema of a config, its checks, its composition."""
