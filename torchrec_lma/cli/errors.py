"""Errors of several ranks: most fail alike, and one message says it."""

import hashlib
import os
from datetime import timedelta


def first_to_say(message: str) -> bool:
    """Whether no other rank of this attempt has said it. True where torchrun's store cannot be asked."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun's agent holds a store that outlives ranks
        return True
    from torch.distributed import DistError, TCPStore

    key = hashlib.sha256(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} {message}".encode()).hexdigest()
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
        )
        return store.add(f"said/{key}", 1) == 1
    except (DistError, OSError, RuntimeError):
        return True
