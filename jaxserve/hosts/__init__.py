"""Several hosts that run one engine: who they are, what they tell each other, and who is late. No jax.

Host 0, the leader, plans; the others, its followers, run the same launches on their devices.
"""

DONE = 0
CRASHED = 1
REFUSED = 2
GAVE_UP = 69
LOST = 75
"""How a follower's engine process ends: its leader has stopped; it failed by itself; something is wrong that starting
again does not cure; there is no leader (EX_UNAVAILABLE); all hosts start again (EX_TEMPFAIL)."""
