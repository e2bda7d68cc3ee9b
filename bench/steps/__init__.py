"""The steps of the GPU check that are programs of its own, one a file; ``python -m bench.steps NAME`` runs one.

A step is a function of the settings that yields what it finds, each at once, and raises `StepFailed` or `NotAvailable`.
Nothing large is imported here: the check's own process reads the table below, and loads no torch.
"""

from __future__ import annotations

STEPS = {
    "probe": "probe:probe",
    "select": "select:select",
    "tickets": "waiting:by_tickets",
    "cooperative": "waiting:all_at_once",
    "hand-over": "hand_over:time_hand_over",
    "crowded": "waiting:while_others_fill_the_device",
    "one-or-several": "one_or_several:compare",
    "reduce-overhead": "reduce_overhead:run_compiled",
    "end-to-end": "end_to_end:run_models",
    "end-to-end-graphs": "end_to_end_graphs:run_compiled_models",
    "model-graphs": "model_graphs:replay_models",
    "float64": "float64:compare_with_float64",
    "relaunch": "relaunch:relaunch",
    "streams": "streams:run_on_streams",
    "graphs": "graphs:replay_graphs",
    "host": "host:time_the_host",
}
"""File and function of each."""
