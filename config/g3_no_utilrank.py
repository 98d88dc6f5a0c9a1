# Ablation A3 of G3: without util and rank, LM and JEPA alone.
recipe = "g3_no_utilrank"
gate = "g3"
lambda_util = 0.0
lambda_rank = 0.0
gate_lr = gate_lr / 3  # tuned at tiny
