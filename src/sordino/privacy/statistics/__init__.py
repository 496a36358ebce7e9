"""Statistics of frozen features, released once with noise; all that follows is post-processing.

`release.py` says what is released and why one example changes it by at most 1; `mechanism.py` is the mechanism;
`posterior.py` infers from a release what it tells of classes, and `estimates.py` makes of that what clients train on.
"""
