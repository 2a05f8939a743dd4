"""Decisions: events in, instructions out. No torch, no clock, no I/O.

model_spec       a model, as the planner knows it
work             what a pass computes
hardware         a machine, measured
cost             work -> seconds
contention       compute and reads that slow each other down
kv_pages         how a KV cache is cut into pages, which stay
plan             Plan: what lives where
plan_sections    its sections
plan_json        its JSON
host_memory      what lives in CPU memory beside a device
planner          the plan by rule
plan_search      the fastest of several
slot_schedule    which block goes into which slots, when
simulator        the plan and the same instructions on a virtual clock
prediction       what a plan will give
phases           prefill, decode, backward, and their sums
trace            spans of every resource
expert_cache     which expert gets which slot
expert_policies  and which goes
expert_cost      load a miss, or compute it on the CPU
expert_replay    policies on recorded choices
routing          recorded choices
renamed          attributes that had another name
sub_groups       how an optimizer's work is cut
"""
