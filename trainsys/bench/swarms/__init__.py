"""Swarms of many small policies in one process, for `trainsys.bench.sapo`.

Sharing, validation, selection and losses are those of real nodes; the policies are computed together.
"""
