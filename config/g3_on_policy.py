# G3 with full aux, but the labels route the later layers as the gates do now. Open question of the paper.
recipe = "g3_on_policy"
gate = "g3"
oracle = "on_policy"
