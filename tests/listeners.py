"""Who hears a channel, where what is heard does not matter."""


class Nobody:
    """A ``Listener`` of which nothing is asked."""

    def deliver(self, origin: str, kind: str, payload: bytes) -> None:
        pass

    def interrupt(self) -> None:
        pass

    async def resume(self) -> None:
        pass
