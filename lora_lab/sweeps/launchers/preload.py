"""Imported by the fork server (fork_server.py): all that a job needs, before it is forked."""

import gc

from lora_lab.sweeps.launchers import processes as processes

# What was imported lives as long as the process. Frozen, the garbage collector does not look at it
# again: not in the jobs, where a look writes to each object's header and so copies the memory that
# the job shares with the server, and not when the server ends.
gc.freeze()
