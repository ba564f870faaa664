"""Password checks with a rate limit on failed ones, per account and from all addresses together.

A check consumes from the quota before the password is compared, and is refunded unless the password is wrong:
concurrent guesses gain nothing over sequential ones. Beyond the quota the password is not compared.

A known network of an account, one with a recent sign-in, has a quota of its own: an attacker elsewhere cannot lock the
owner out there. All other networks share one quota per account. A session that checks its user's password again has a
quota of its own, too.
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
    match: PasswordMatch | None = None
    try:
        match = await hasher.verify(password, hashed)
    finally:
        if match is not PasswordMatch.MISMATCH:
            await limiter.refund(LIMIT, key)
    return match


def account_key(email_key: str, *, network: Network | None) -> str:
    """Return the key of an account's quota: of one known network, or with None of all others together.

    ``email_key`` is derived from the address as it was typed, so that unknown addresses behave like known ones.
    """
    account = hashlib.sha256(email_key.encode()).hexdigest()
    return f"account:{account}" if network is None else f"account:{account}:{network}"
