"""What reads files.

base     the protocol
posix    preadv on O_DIRECT
kvikio   kvikio, where a probe shows it faster
"""
