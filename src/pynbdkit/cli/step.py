"""One step of a plugin's life at the start: whatever it raises becomes one line."""

from __future__ import annotations

from .. import log
from ..errors import ConfigError, PynbdkitError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def step(layer: str, name: str, call: Callable[[], object]) -> None:
    """Do the step `name` of a layer. Raises ConfigError (or what else is for the user).

    A mistake of the user's says what is wrong by itself. Any other exception is the plugin's: it
    is told with its place; --verbose adds the traceback.
    """
    try:
        call()
    except PynbdkitError:
        raise
    except Exception as failure:
        if log.verbose:
            import traceback

            for line in "".join(traceback.format_exception(failure)).rstrip().splitlines():
                log.debug(line)
        parts = [layer, name, log.describe(failure)]
        if not isinstance(failure, (OSError, ValueError)):
            parts.insert(0, _place(failure))
        raise ConfigError(": ".join(parts)) from None


def _place(failure: Exception) -> str:
    """FILE:LINE of the innermost code."""
    traceback = failure.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
