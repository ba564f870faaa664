"""What every request shares, whatever its feature.

Passes through: request ids and the log line, rendering of errors, admission (signed in, within the limit,
allowed), validation, the OpenAPI document, pages and ETags. Knows no feature and no table: ``app.py`` hands
in who authenticates and who authorizes.
"""
