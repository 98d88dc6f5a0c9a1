# The paper's G3 with its standard losses: util and rank from off-policy labels on the whole batch, and JEPA.
recipe = "g3_full_aux"
gate = "g3"
oracle = "off_policy"
label_share = 1.0
lambda_util = 1.0
lambda_rank = 1.0
lambda_jepa = 1.0
