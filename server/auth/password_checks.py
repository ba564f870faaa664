"""Password checks with a rate limit on failed ones, per account and from all addresses together.

A check consumes from the quota before the password is compared, and is refunded if the password matches: concurrent
guesses gain nothing over sequential ones. Beyond the quota the password is not compared.

All networks that are not known for an account share its quota; each known network (a recent sign-in came from there)
has its own, so that strangers cannot lock the owner out there. A session that checks its user's password has its own,
too.
"""

import hashlib

from server.auth.passwords import Hasher, PasswordMatch
from server.ratelimit import RateLimiter
from server.settings import Network

LIMIT = "account"


async def check(limiter: RateLimiter, hasher: Hasher, password: str, hashed: str | None, *, key: str) -> PasswordMatch:
    """Compare the password with the hash; a mismatch counts in the quota of ``key``.

    Raises:
        QuotaExceeded: too many checks have failed.
        Unavailable: too many checks are running.
    """
    await limiter.consume(LIMIT, key)
    fit: PasswordMatch | None = None
    try:
        fit = await hasher.verify(password, hashed)
    finally:
        if fit is not PasswordMatch.MISMATCH:
            await limiter.refund(LIMIT, key)
    return fit


def account_key(email_key: str, *, network: Network | None) -> str:
    """Return the key of an account's quota: of one known network, or with None of all others together.

    ``email_key`` is derived from the address as it was typed, so that unknown addresses behave like known ones.
    """
    account = hashlib.sha256(email_key.encode()).hexdigest()
    return f"account:{account}" if network is None else f"account:{account}:{network}"
