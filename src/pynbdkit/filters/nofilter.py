"""nofilter: pass everything through unchanged (nbdkit-nofilter-filter(1)).

Its device overrides nothing, so each operation is bound to the layer below: a request never
comes here.
"""

from __future__ import annotations

from ..filter import Filter


class NoFilter(Filter):
    """Pass requests through unchanged."""

    longname = "passthrough filter"
    forkable = True
