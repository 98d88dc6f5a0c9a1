# G3 with full aux at a quarter of the tokens.
recipe = "g3_budget25"
gate = "g3"
budget = 0.25
