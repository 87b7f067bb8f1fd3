"""Cancel a generation from outside: from another thread, a signal handler or a web server."""

import threading

from mezzotint.errors import Cancelled


class CancelToken:
    """A flag that `generate` checks before each image and after each denoising step.

    >>> token = CancelToken()
    >>> token.cancel()
    >>> token.cancelled
    True
    """

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Request cancellation. It takes effect at the next check and cannot be undone."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Return whether `cancel` was called."""
        return self._event.is_set()

    def check(self) -> None:
        """Raise Cancelled if `cancel` was called."""
        if self.cancelled:
            raise Cancelled(
                "generation was cancelled", "images that were yielded before are complete."
            )
