"""What became of the KV cache, in sentences."""

from collections.abc import Mapping
from typing import Any

from offload.storage.errors import gib


def _planned(kv: Mapping[str, Any]) -> str:
    least = kv.get("planned_bytes_per_pass", 0)
    return f" ({gib(least)} a pass at the end of what was reserved for)" if least else ""


def kv_sentences(kv: Mapping[str, Any]) -> list[str]:
    """The gist of `Report.kv`, for a terminal and a page; nothing where all of it stayed on the device."""
    said = []
    if "page_bytes" in kv:
        seen = f", queries see {kv['budget']}" if kv["budget"] else ""
        peaks = {"the device": "peak_gpu_bytes", "CPU memory": "peak_cpu_bytes", "disk": "peak_nvme_bytes"}
        where = ", ".join(f"{gib(kv[key])} on {name}" for name, key in peaks.items() if kv[key])
        said.append(
            f"KV cache in pages, policy {kv['policy']}{seen}; {gib(kv['memory_bytes'])} of the device for it, "
            f"{gib(kv['page_bytes'])} a page; at most {where or 'nothing'}; {gib(kv['written_bytes'])} were offloaded, "
            f"{gib(kv['onloaded_bytes'])} onloaded" + _planned(kv)
        )
        if kv["unquantized_pages"]:
            said.append(
                f"{kv['unquantized_pages']:,} of {kv['full_pages']:,} pages were kept unquantized: "
                "their error would have been too large"
            )
    loaded, computed = kv.get("prefix_loaded_tokens", 0), kv.get("prefix_computed_tokens", 0)
    if loaded or computed:
        said.append(f"prompt prefixes: {loaded:,} tokens loaded, {computed:,} computed once for all sequences that share them")
    return said
