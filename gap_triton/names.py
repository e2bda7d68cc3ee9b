"""Names that the parts of a pruned model know each other by."""

NAME = "gap_triton"  # of the attention implementation
STATE_KEY = "gap_state"  # the keyword under which the state of one forward travels through the model
CALL_KEY = "gap_call"  # and what the module with the language head tells it
WATCHED = "_gap_watched"  # marks the attention of a vision tower's scoring layer
