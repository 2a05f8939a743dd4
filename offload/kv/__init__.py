"""The KV cache: where its pages are (store), which of them are kept and how (method), how they are read (attention)."""
