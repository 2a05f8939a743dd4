"""Experts, cached one by one: a component.

component          the component, and what becomes of a miss
options            what a user may ask of it
placement          where experts come from: files, CPU memory
slots              experts in device slots, and on their way there
streaming          one call of a layer's experts, from routing to result
forward            brings what one call needs, in order
slot_tensor        weights that lie in slots, for the model's own code
router_prediction  asks the next layer's router early
routing_log        what was routed, for traces and for the offline-optimal bound
usage              sums it up for the report
"""
