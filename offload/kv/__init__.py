"""The KV cache: a component. Where its pages are, which of them stay and how, how they are read.

component           the component
options             what a user may ask of it
demand              the ways to keep it in pages, for the planner
reservation         memory for the next pass; more of it when a cache outgrows it
paged_cache         the pages of a session
store               seals pages, moves them down, brings them ahead
prefetch            pages on their way
page_layout         what a page holds
kv_block            tokens of one layer in a page
layer               the blocks of one layer of one cache
reading             a block that is being read
assembly            blocks put together: neighbours in one
buffer_cache        memory for assembled layers, used again
quantization        full pages in fewer bytes
state_offload       states of layers that do not keep all tokens
attention           segments, merged
attention_backend   takes the place of the model's attention
transformers_cache  the cache as transformers sees it
lazy_tensor         keys and values that are somewhere
prefix_cache        prefixes of prompts, computed or loaded once
prefix_store        prefix blocks on disk
"""
