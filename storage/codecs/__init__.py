"""Numbers in fewer bytes. They know no model: who uses them says which numbers make a line.

base            the protocol for numbers that are encoded here
weights         the protocol for weights that come encoded, and numbers of another dtype
ggml            block types of GGUF files
scaled_numbers  8-bit floats and integers
four_bits       which stand for one of sixteen numbers
packed_integers 4- and 8-bit integers in words
decode_speed    how fast this machine decodes them
affine_groups   integers, a scale and a minimum a group: pages of the KV cache
power_blocks    levels closer together near zero, a scale a block: optimizer moments
"""
