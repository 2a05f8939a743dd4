"""What one layer of a KV cache remembers, and what a query sees of it.

base      the protocol, and full attention
window    the first tokens and the last ones
retrieve  the pages that a query is likely to attend to
budget    how much that is
"""
