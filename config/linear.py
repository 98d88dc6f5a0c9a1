# Mixture-of-Depths style (Raposo et al. 2024): a linear score that scales the output, LM loss alone.
recipe = "linear"
gate = "linear"
estimator = "scaled"
lambda_util = 0.0
lambda_rank = 0.0
