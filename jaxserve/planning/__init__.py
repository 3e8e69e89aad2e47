"""What a model would need, and do at best, on devices that need not be here: compiled for them, never run.

`chips` and `topology` say what the devices are, `steps` compiles, `estimate` works out speeds, `planner` joins them.
"""
