# The frozen model teaches twice: distillation replaces the LM loss, and labels compare both branches with what the
# frozen model predicts, under the current routing. Several layers get labels in a step, on a quarter of the rows,
# and rank alone learns from them. Muon trains the cheap FFNs.
recipe = "distill_labels"
gate = "g1"
estimator = "ste_norm"
lambda_lm = 0.0
lambda_distill = 1.0
lambda_util = 0.0
lambda_rank = 1.0
oracle = "on_policy"
label_target = "dense"
label_layers = 5
label_share = 0.25
muon_lr = 3e-2
gate_lr = 1e-2
