"""Your own goodput: ``make scoreboard`` finds the highest rate of arrivals that these settings stand. See
IMPLEMENTATION_GUIDE.md, "Open tasks".

Nine of ten requests must have their first token within 0.5 s and each further one within 30 ms on average. The file is read and
not run, so write plain values. `policy` is "fcfs", "priority" or "lpm"; `preemption_mode` is "recompute" or "swap"; the others
are whole numbers. A prompt gets at most `long_prefill_token_threshold` tokens in a step (0: as many as there is room for).
"""

SETTINGS = {
    "max_num_seqs": 48,
    "max_num_batched_tokens": 512,
    "long_prefill_token_threshold": 0,
    "preemption_mode": "recompute",
    "policy": "fcfs",
}
