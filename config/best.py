# The recipe that measures best so far, and it is a simple one.
recipe = "best"
gate = "g1"
estimator = "scaled"
lambda_util = 0.0
lambda_rank = 0.0
share_step = 0.25
