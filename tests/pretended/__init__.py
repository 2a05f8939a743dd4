"""A pretended CUDA card, on the CPU build of torch: `device="cuda"`, the CUDA device class and tests/gpu run unchanged.

    python -m pytest -p tests.pretended.plugin tests/gpu          (make test-card)

It refuses what a card refuses (tensors of two devices, more memory than there is), fills freed memory with 0xFF, and checks
order: an access that no event orders against the last write or reads of the same bytes raises, with both places, every time.
Copies on side streams land as late as the order allows. It counts what stops the host, by place, and has a clock of its own,
on which a test says how long kernels and copies take.

Not shown: the kernels of a real card, their bits and restrictions; real memory and speed; two cards.

card.cpp        the device: memory, streams, events, one fallback for every operator
order.h         vector clocks, and the last accesses to every range of memory
build           compiles both, once
torch_cuda      stand-ins for what torch.cuda asks of a driver
plugin          loads all before torch is imported
"""
