# G3 with full aux under Mixture-of-Depths' estimator.
recipe = "g3_scaled_off_policy"
gate = "g3"
estimator = "scaled"
oracle = "off_policy"
gate_lr = 10 * gate_lr / 3  # tuned at tiny
