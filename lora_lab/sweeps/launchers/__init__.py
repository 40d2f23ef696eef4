"""How a multirun's jobs are spread over processes, of this machine or of a cluster."""
