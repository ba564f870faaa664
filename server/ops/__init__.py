"""Operations: liveness, readiness and metrics for operators.

The health, readiness and metrics endpoints of servers and workers, and the periodic samples behind the metrics, pass
through here. This package never changes anything in a store, and liveness never asks one.
"""
