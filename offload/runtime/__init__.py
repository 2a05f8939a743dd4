"""The one loop, and what it drives.

component           what plugs into a session
call                what a pass is: its kind, its rows
machine             Host and Machine: opened once, handed on as one
notes               what is told beside results
page_locked         CPU memory that a device copies from
shared_lock         one forward at a time
executor            opens blocks, looks ahead, waits, binds, closes
passes              one call of the whole model
layer_major         several micro-batches, layer by layer
module_wrappers     wraps forward: onload, compute, unbind; or compute on the CPU
placement           brings parameters to their tier, and back
weights             blocks in slots, and resident ones
block_reads         blocks on their way into host memory of their own
loading_blocks      resident blocks that the first pass waits for
early_reads         what an earlier session kept, read before the model is known
block_sources       how a block's bytes get into a slot
embedding_rows      tables of which rows are fetched
row_upload          small tensors on their way to the device
hybrid_linear       products that device and CPU share
prefill_chunks      prompts in chunks
spilling            weights that no file holds, written to one
buffers             the model's buffers on the device
merged_adapters     peft's merges, where written memory is not told
registration_watch  notices what is added to the model
model_facade        what the model answers inside of the context
adapted_parameters  peft's wrappers of fused experts
rng_state           generators and autocast, replayed
clock               whose time it is
recorder            spans and memory over time
kernel_memory       what CPU kernels keep, held back in a tight budget
padded_products     products of experts in few sizes
meters              tiers, links and peaks
interrupts          Ctrl-C, held while a model is taken hold of
"""
