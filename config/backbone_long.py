# The dense model trained four times as long, until its val loss flattens: for the study.
recipe = "backbone_long"
mode = "dense"
max_iters = 4 * backbone_iters
learning_rate = backbone_lr
muon_lr = backbone_muon_lr
batch_size = backbone_batch_size
warmup_iters = 50
weight_decay = 0.1
eval_interval = 250
min_lr_ratio = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
gradient_accumulation_steps = 1
