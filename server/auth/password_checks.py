"""Password checks, counted: guesses at an account end, wherever they come from.

A check is taken from its budget before the password is looked at, and given back where it fits: so many guesses at once
are as good as one after the other. Beyond the budget the password is not looked at.

All networks from which an account was not signed in to lately share its budget; each known network has one of its own,
so that strangers cannot lock the owner out there. A session that checks the password of its user has its own, too.
"""

import hashlib

from server.auth.passwords import Fit, Hasher
from server.ratelimit import RateLimiter
from server.settings import Network

LIMIT = "account"


async def check(limiter: RateLimiter, hasher: Hasher, password: str, hashed: str | None, *, key: str) -> Fit:
    """Return how the password fits; if it does not, it counts in the budget of ``key``.

    Raises:
        QuotaExceeded: too many have failed.
        Unavailable: too many are being checked.
    """
    await limiter.take(LIMIT, key)
    fit: Fit | None = None
    try:
        fit = await hasher.verify(password, hashed)
    finally:
        if fit is not Fit.NONE:
            await limiter.give_back(LIMIT, key)
    return fit


def account_key(email_key: str, *, network: Network | None) -> str:
    """Return the key of an account's budget: for one known network, or None for all others together.

    ``email_key`` is that of the address as it was typed, so that unknown addresses behave like known ones.
    """
    account = hashlib.sha256(email_key.encode()).hexdigest()
    return f"account:{account}" if network is None else f"account:{account}:{network}"
