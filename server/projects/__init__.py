"""Projects and who is in them. ``access`` is the only place that decides who may do what."""
