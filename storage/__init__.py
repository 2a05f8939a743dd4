"""Bytes and their movement between tiers. Knows nothing of models.

blocks        names, sizes, tiers, ranges of files
errors        all errors
ledger        who holds how much of a tier
arrival       bytes on their way
transfer      one queue a link
read_plan     scattered tensors -> aligned places in a slot
load_plan     what is read of a block, and decoded to its places
gguf_header   where the tensors of a GGUF file are
reader        whole units, O_DIRECT
read_speed    what a disk gives to plain reads
contention    what products and reads leave of each other's rate
staging       disk -> page-locked ring -> device
staging_ring  buffers that bytes pass through
host_buffer   page-aligned CPU memory
checkpoint    safetensors headers
fingerprint   tells one content of a file from another
digest        the same of a tensor in memory
block_file    converted and spilled weights
state_file    optimizer state
whole_file    files that are whole, or not there
devices       what computes
pages         pages on three tiers
io_engines    what reads files
codecs        numbers in fewer bytes
"""
