# The recipe that measures best so far, and it needs no labels: the frozen model teaches. Distillation replaces the
# LM loss. The cheap FFNs start fitted to the full ones. Layers that are worth more get more of the budget. Muon
# trains the cheap FFNs.
recipe = "best"
gate = "g1"
estimator = "ste_norm"
lambda_lm = 0.0
lambda_distill = 1.0
lambda_util = 0.0
lambda_rank = 0.0
cheap_start = "fitted"
layer_spread = 0.8
muon_lr = 1e-2
gate_lr = 1e-2
