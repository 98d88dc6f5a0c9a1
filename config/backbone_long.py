# The dense model trained four times as long, until its val loss flattens: for the study.
recipe = "backbone_long"
mode = "full"
max_iters = 4 * backbone_iters
learning_rate = backbone_lr
muon_lr = backbone_muon_lr
batch_size = backbone_batch_size
warmup_iters = 50
eval_interval = 250
