"""Proof under fire: the real stack, real processes, and what it promises while things break.

    python -m tests.fire --help

Every scenario counts trials and violations of named promises. What is random comes from one seed.
"""
