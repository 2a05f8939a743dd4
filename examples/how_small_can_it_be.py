"""Ask for too little memory, and be told what would do."""

from offload import BudgetTooSmall, offload

try:
    with offload("demo", device="cpu", cpu_memory="100KiB", max_tokens=64):
        pass
except BudgetTooSmall as refusal:
    print(refusal)
    with offload("demo", device="cpu", cpu_memory=refusal.least_bytes, max_tokens=64) as session:
        print(f"with {refusal.least_bytes} bytes it runs: {len(session.plan.weights.streamed)} blocks are streamed")
