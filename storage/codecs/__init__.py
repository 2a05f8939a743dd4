"""Numbers in fewer bytes. They know no model: who uses them says which numbers make a line.

base            the protocol
affine_groups   integers, a scale and a minimum a group: pages of the KV cache
power_blocks    levels closer together near zero, a scale a block: optimizer moments
"""
