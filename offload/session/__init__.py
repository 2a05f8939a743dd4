"""A session: assembles what others do, and decides nothing by itself.

session           Session: its lifetime and its public methods
opening           how a model is taken hold of: found, planned for, loaded, placed, wrapped
session_machine   what it runs on, within which budgets
training_methods  the methods of Session for training
cache_methods     the methods of Session for the KV cache
expert_methods    the methods of Session for experts
request           what was asked
prepare           request + model -> plan: the one way, for sessions and for `offload plan`
preview           `offload plan`: a plan without loading
components        which components a session has
residency         the live plan: slots, blocks given up, changes adopted
opened            what a session holds while it is open
reporting         collects the report
"""
