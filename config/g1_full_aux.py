# The paper's G1 with its standard losses: the MLP gate, util and rank from off-policy labels on all rows.
recipe = "g1_full_aux"
gate = "g1"
oracle = "off_policy"
label_share = 1.0
lambda_util = 1.0
lambda_rank = 1.0
