# Ablation A4: a quarter of the JEPA weight.
recipe = "g3_jepa_025"
gate = "g3"
lambda_jepa = 0.25
