"""What the server imports from which jobs are forked, so that each of them begins at once."""

import gc

from lora_lab.sweeps.launchers import processes as processes

gc.freeze()  # none of it is ever garbage: neither jobs nor the server's own end look at it again
