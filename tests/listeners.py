"""Listeners of a channel for tests that do not check what they receive."""


class Nobody:
    """A ``Listener`` that ignores everything."""

    def deliver(self, origin: str, kind: str, payload: bytes) -> None:
        pass

    def interrupt(self) -> None:
        pass

    async def resume(self) -> None:
        pass
