"""How a rotation is computed: in blocks that fit a CPU's cache, or by Triton. The formula itself stands in `rotation`.

Nothing here imports `rotation`, and Triton is imported at its first use only.
"""
