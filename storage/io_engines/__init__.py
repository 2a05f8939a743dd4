"""What reads files.

base   the protocol
posix  preadv on O_DIRECT
gds    kvikio, GPUDirect Storage
"""
