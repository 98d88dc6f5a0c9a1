# G1 with full aux, but the labels route the later layers as the gates do now. Open question of the paper.
recipe = "g1_on_policy"
gate = "g1"
oracle = "on_policy"
