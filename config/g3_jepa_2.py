# Ablation A4: twice the JEPA weight.
recipe = "g3_jepa_2"
gate = "g3"
lambda_jepa = 2.0
