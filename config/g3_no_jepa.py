# Ablation A1: G3 with util and rank but without the JEPA alignment. Does the predictor collapse?
recipe = "g3_no_jepa"
gate = "g3"
lambda_jepa = 0.0
