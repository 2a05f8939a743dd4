"""Pages of one size on three tiers.

pool   pages, wherever they are
slots  memory that pages pass through
file   pages on disk
"""
