"""The session's own optimizer.

streamed_optimizer  steps everything, sub-group by sub-group
trainable_set       what is trained, as it was at one moment
trained_weights     trained weights, wherever they are
update_rules        one step: AdamW, AdamW in 8 bits, SGD
states              the protocol of optimizer state
cpu_states          state in CPU memory
nvme_states         state on NVMe
checkpoint          saved, and resumed from
"""
