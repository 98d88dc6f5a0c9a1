# Ablation A3 of G1: without util and rank, the LM loss alone.
recipe = "g1_no_utilrank"
gate = "g1"
lambda_util = 0.0
lambda_rank = 0.0
