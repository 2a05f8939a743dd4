"""Training while weights are streamed: a component.

component  the component
options    `Training`: what a user may ask
demand     a plan beside what training holds
memory     what training holds, known beforehand
estimate   what a training will take, before its first step
weighting  shares of a step's tokens
"""
