# G1 with full aux at a quarter of the tokens.
recipe = "g1_budget25"
gate = "g1"
budget = 0.25
