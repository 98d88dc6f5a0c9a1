# Web-like prose, byte-level, four times the parameters of tiny, twice its context: a second regime for a CPU.
# python prepare.py --source='my/*.parquet' --name=web --tokenizer=bytes
scale = "web"
dataset = "web"
n_layer = 8
n_embd = 256
block_size = 256
controlled = list(range(1, 8))
cheap_rank = 64
g1_hidden = 58
latent = 24
max_iters = 600
backbone_iters = 1_000
backbone_long_iters = 4_000
