# Random routing at a quarter of the tokens.
recipe = "random_budget25"
gate = "random"
budget = 0.25
