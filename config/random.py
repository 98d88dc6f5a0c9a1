# What the budget is worth with no decision: each row sends a random half full.
recipe = "random"
gate = "random"
