"""Models from ModelScope and Hugging Face, in a cache that several processes share.

The hubs' own libraries (`safelight[hub]`) list and transfer; what they do not promise is added here: one download for
all who ask, resumed also by another process, and a file that has its name only when it is whole and its digest right.
"""

from safelight.hub.fetching import HUBS, fetch_model, open_snapshot
from safelight.hub.snapshot import Snapshot

__all__ = ["HUBS", "Snapshot", "fetch_model", "open_snapshot"]
