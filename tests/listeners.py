"""Listeners of a channel for tests that do not check what they receive."""


class NullListener:
    """A ``Listener`` that ignores everything."""

    def deliver(self, origin: str, kind: str, payload: bytes) -> None:
        pass

    def on_disconnect(self) -> None:
        pass

    async def resync(self) -> None:
        pass
