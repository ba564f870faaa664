"""The worker process, put together on one page."""

from server.settings import Settings


def run(settings: Settings) -> None:
    raise NotImplementedError
