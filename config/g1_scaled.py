# G1 without util and rank under Mixture-of-Depths' estimator: what the LM loss alone teaches when w scales the output.
recipe = "g1_scaled"
gate = "g1"
estimator = "scaled"
lambda_util = 0.0
lambda_rank = 0.0
gate_lr = 10 * gate_lr / 3  # tuned at tiny
