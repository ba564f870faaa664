"""The REST layer: everything that requests of all features share.

Request ids and access log, error rendering, admission (authentication, rate limit, authorization), validation,
pagination, ETags, idempotency keys, CORS and the OpenAPI document pass through here. This package never knows a feature
or a feature's table: ``app.py`` passes in the functions that authenticate and authorize.
"""
