"""What computes, and copies to it.

base     the protocol
cpu      the CPU: its memory is the host's
cuda     a CUDA card: streams, events, page locks
resolve  finds the one that a user names
"""
